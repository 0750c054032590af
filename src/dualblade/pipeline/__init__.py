"""Makes it happen in time: reads ahead of compute, writes behind it, in fixed memory."""

from dualblade.pipeline.kv import KVPipeline
from dualblade.pipeline.memory import MemoryKV
from dualblade.pipeline.offer import Offer
from dualblade.pipeline.settings import KVSettings

__all__ = ["KVPipeline", "KVSettings", "MemoryKV", "Offer"]
