"""The one legend of axis letters. Arrays are named `x_BTD`, annotated `Float[Array, "B T D"]`.

B batch          T query / target length     S key / source length
D model (embed)  N query heads  K kv heads   G query heads per kv head (N // K)
H head dim       F feed-forward              V vocabulary
E experts        C expert capacity           L stacked layers
"""

from jaxtyping import Array, Bool, Float, Int, Key, PyTree

__all__ = ["Array", "Bool", "Float", "Int", "Key", "PyTree"]
