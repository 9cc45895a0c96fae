"""Training a compressed model back towards the dense one: what is trained, the losses, the optimizer, and trainable structured layers.

`effllm.recover` (run.py) is the entry point. Only `run` knows of all the others; each of them works alone.
"""
