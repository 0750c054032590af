"""Makes it happen in time: reads ahead of compute, writes behind it, in fixed memory."""

from dualblade.pipeline.kv import KVPipeline, KVSettings

__all__ = ["KVPipeline", "KVSettings"]
