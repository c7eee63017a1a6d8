"""Low-rank adapters as operations of the program: attach, merge, and exchange with PEFT."""

from irprune_passes.lora.attach import Lora
from irprune_passes.lora.merge import Merge
from irprune_passes.lora.save import SaveLora

__all__ = ["Lora", "Merge", "SaveLora"]
