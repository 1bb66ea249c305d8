# The C functions (kernels.c). The caller must keep the memory at each address alive.

HAS_AVX2: int

def fill(
    state: int,
    target: int,
    count: int,
    is_normal: bool,
    dtype: int,
    fused: bool,
    avx2: bool,
    first: float,
    second: float,
    /,
) -> None: ...
def fill_rows(
    state: int,
    target: int,
    count: int,
    begin: int,
    length: int,
    stride: int,
    is_normal: bool,
    dtype: int,
    fused: bool,
    avx2: bool,
    first: float,
    second: float,
    /,
) -> None: ...
def normal_at(
    state: int,
    places: int,
    chosen: int,
    values: int,
    count: int,
    dtype: int,
    fused: bool,
    avx2: bool,
    mean: float,
    std: float,
    /,
) -> None: ...
def pass_over(state: int, count: int, avx2: bool, /) -> None: ...
def polynomial(exponent: int, avx2: bool, /) -> bytes: ...
def leap_by(state: int, polynomial: bytes, used: int, avx2: bool, /) -> None: ...
