"""Plan a transformer of 48 layers and about a billion parameters, from its trace; nothing of it is allocated.

    python benchmarks/plan.py

Three ways to write the same depth in Flax: a Python loop over layers, `nn.scan`, and `nn.remat` of each block in a loop. For each: seconds
from the call to the plan, number of leaves, and the bytes of arrays that are alive afterwards and were not before.
"""

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

import paperjax as pj
from paperjax.model import count

LAYERS, WIDTH, HEAD, VOCABULARY, LENGTH = 48, 1280, 64, 50257, 1024


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    width: int

    @nn.compact
    def __call__(self, h_BxTxD, _=None):
        """One block; shaped for `nn.scan`."""
        h_BxTxD = h_BxTxD + nn.MultiHeadDotProductAttention(self.width // HEAD)(nn.LayerNorm()(h_BxTxD))
        hidden_BxTxF = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h_BxTxD)))
        return h_BxTxD + nn.Dense(self.width)(hidden_BxTxF), None


class Transformer(nn.Module):
    """A decoder without a mask, which no plan depends on."""

    width: int
    depth: int
    style: str

    @nn.compact
    def __call__(self, tokens_BxT):
        """Tokens to logits."""
        h_BxTxD = nn.Embed(VOCABULARY, self.width)(tokens_BxT) + self.param("position", nn.initializers.normal(0.02), (LENGTH, self.width))
        if self.style == "scan":
            layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
            h_BxTxD, _ = layers(self.width)(h_BxTxD, None)
        else:
            block = nn.remat(Block) if self.style == "remat" else Block
            for _ in range(self.depth):
                h_BxTxD, _ = block(self.width)(h_BxTxD)
        return nn.Dense(VOCABULARY)(nn.LayerNorm()(h_BxTxD))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    layers = parser.parse_args().layers
    x = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    print(f"{'style':>8} {'parameters':>14} {'leaves':>7} {'seconds':>8} {'bytes left':>11}")
    for style in ("scan", "loop", "remat"):
        family = pj.family(lambda width, depth, style=style: Transformer(width, depth, style), x=x)
        before = sum(a.nbytes for a in jax.live_arrays())
        began = time.perf_counter()
        plan = pj.plan(family, pj.completep, base=dict(width=256, depth=2), target=dict(width=WIDTH, depth=layers), optimizer="adamw")
        seconds = time.perf_counter() - began
        left = sum(a.nbytes for a in jax.live_arrays()) - before
        n = count(family.shapes(width=WIDTH, depth=layers))
        print(f"{style:>8} {n:>14,} {len(plan.leaves):>7} {seconds:>8.1f} {left:>11,}", flush=True)


if __name__ == "__main__":
    main()
