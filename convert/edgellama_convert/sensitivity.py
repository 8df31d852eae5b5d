MEASURED_TOKENS=4096
class Sensitivity: pass
