"""Pictures of attention: what each token can see, and what it really looks at, in the terminal and as a file.

    visualize_attention_mask(llm, "Hello this is a test")                       # or a tokenizer, or a model file
    visualize_attention_mask(llm, "Hello this is a test", out="mask.png")       # or mask.svg
    visualize_attention_mask(llm, "Hello this is a test", layer=3, head=1, out="weights.png")

Modules: `attention` (tokens, mask and weights as numbers), `text` (for a terminal), `picture` (matplotlib, an extra).
"""

from edgellama.visualize.attention import Attention, attention_weights, visualize_attention_mask

__all__ = ["Attention", "attention_weights", "visualize_attention_mask"]
