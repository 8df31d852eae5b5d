"""edgellama: run Llama models on your own machine."""
