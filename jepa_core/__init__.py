"""The JEPA family as pure functions and modules: torch, timm and numpy, nothing else.

No ray, no I/O, no configuration library. `jepa_core.config` imports without torch.
"""
