"""Every setting of `compress`, with its default, and which method has which."""
from dataclasses import dataclass, fields

from engine.grids import check_count, check_damp, check_grid, check_pattern

METHODS = {  # and the settings that belong to each, beside group_size and targets
    "rtn": ("bits", "symmetric"),
    "gptq": ("bits", "symmetric", "act_order", "search", "refit", "damp", "block_size", "keep_zeros"),
    "magnitude": ("sparsity", "n_m", "bits"),
    "wanda": ("sparsity", "n_m", "bits"),
    "sparsegpt": ("sparsity", "n_m", "bits", "refit", "damp", "block_size", "keep_zeros"),
}


@dataclass
class CompressConfig:
    method: str = "gptq"           # one of METHODS
    bits: int | None = None        # 2 to 8; for a pruning method: what stays is quantized too
    group_size: int | None = None  # columns that share a grid; None: one grid a row
    symmetric: bool = False        # the zero-point in the middle of every grid
    act_order: bool = False        # the most active columns first
    search: bool = False           # narrower grids where they lose less
    refit: bool = False            # in the end fit what is still free by least squares
    sparsity: float | None = None  # share of weights set to zero
    n_m: tuple | None = None       # or N weights kept of every M
    damp: float = 0.01             # share of the mean diagonal that is added to H
    block_size: int = 128          # columns in a lazy batch, and for sparsegpt in a mask
    keep_zeros: bool = False       # every zero stays; False: those of layers that we pruned
    targets: tuple | None = None   # layers by name, "mlp.down" or "blocks.0.attn.q"; None: all

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        self.prunes = "sparsity" in METHODS[self.method]
        known = (*METHODS[self.method], "group_size", "targets")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in known:
                raise ValueError(f"{self.method} has no setting {field.name}, got {value!r}")
        if self.prunes:
            check_pattern(self.sparsity, self.n_m)
        elif self.bits is None:
            raise ValueError(f"{self.method} needs bits, from 2 to 8")
        if self.bits is None and self.group_size is not None:
            raise ValueError(f"group_size needs bits: without them nothing is rounded, got {self.group_size}")
        check_grid(self.bits, self.group_size, self.n_m)
        check_count(self.block_size, "block_size")
        check_damp(self.damp)

    def simplest(self):
        """The same with the simplest method instead: what the report compares with."""
        return CompressConfig("magnitude" if self.prunes else "rtn", self.bits, self.group_size, self.symmetric,
                              sparsity=self.sparsity, n_m=self.n_m, targets=self.targets)
