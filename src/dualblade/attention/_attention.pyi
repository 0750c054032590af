BLOCK_TOKENS: int

class Run:
    def __init__(
        self,
        *,
        data: int,
        tile_stride: int,
        sequence_stride: int,
        head_stride: int,
        row_stride: int,
        first_token: int,
        tokens: int,
        tile_rows: int,
        first_sequence: int,
        sequences: int,
        table: int,
    ) -> None: ...

class Attention:
    def __init__(self, threads: int, kernel: str) -> None: ...
    @property
    def kernel(self) -> str: ...
    def begin(
        self,
        *,
        data: int,
        sequence_stride: int,
        head_stride: int,
        token_stride: int,
        batch: int,
        kv_heads: int,
        group: int,
        tokens: int,
        key_dim: int,
        value_dim: int,
        past: int,
        first_visible: int,
        scale: float,
        bfloat16: bool,
    ) -> None: ...
    def keys(self, run: Run) -> None: ...
    def values(self, run: Run) -> None: ...
    def both(self, keys: Run, values: Run) -> None: ...
    def finish(self, sinks: int, out: int) -> None: ...
