"""The formulae of docs/cost.md: pure arithmetic from a network's shape, in its letters."""

from dataclasses import dataclass

__all__ = ["BITS", "LLAMA", "Adapter", "Shape", "Task"]

# Stored bits of a weight of a linear layer. int8: a scale for each row, which is next to nothing.
# int4: NF4 as bitsandbytes stores it, a byte for each 64 weights and a float for each 64 x 256.
BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.0, "int4": 4 + 8 / 64 + 32 / (64 * 256)}


@dataclass(frozen=True)
class Shape:
    """A Llama: ``h`` hidden, ``f`` inner, ``k`` key-value width, ``L`` blocks, ``v`` tokens."""

    h: int
    f: int
    k: int
    L: int
    v: int

    @property
    def block(self) -> int:
        """Weights of a block's linear layers, ``w = 2h^2 + 2hk + 3hf``."""
        return 2 * self.h**2 + 2 * self.h * self.k + 3 * self.h * self.f

    @property
    def rest(self) -> int:
        """All other weights: embedding, head and norms, ``2vh + (2L + 1)h``."""
        return 2 * self.v * self.h + (2 * self.L + 1) * self.h

    def base_bytes(self, kind: str) -> float:
        """Bytes of the network, whose linear layers but the head are stored as ``kind``."""
        other = 4 if kind == "float32" else 2
        return self.L * self.block * BITS[kind] / 8 + self.rest * other


LLAMA = {
    "7B": Shape(h=4096, f=11008, k=4096, L=32, v=32000),
    "30B": Shape(h=6656, f=17920, k=6656, L=60, v=32000),
    "70B": Shape(h=8192, f=28672, k=1024, L=80, v=32000),
}


@dataclass(frozen=True)
class Adapter:
    """Rank-``r`` adapters on q and v of the top ``layers`` blocks.

    Attributes:
        bayesian: KroneckerInducing with MatrixNormal; otherwise LoRA's ``A`` and ``B`` alone.
    """

    shape: Shape
    r: int
    layers: int
    bayesian: bool = True

    @property
    def share(self) -> float:
        """``a``, the adapted share of the blocks."""
        return self.layers / self.shape.L

    @property
    def sides(self) -> int:
        """``d = sum (d_in + d_out)`` over the matrices of a block: q is h x h, v is k x h."""
        return 3 * self.shape.h + self.shape.k

    @property
    def groups(self) -> int:
        """Stacked groups of layers: q and v are one where they have one shape."""
        return 1 if self.shape.k == self.shape.h else 2

    @property
    def numbers(self) -> int:
        """Trained numbers, ``a L (r d + [2 (3 r^2 + 2 r + 1)])``."""
        r = self.r
        own = 2 * (3 * r * r + 2 * r + 1) if self.bayesian else 0
        return self.layers * (r * self.sides + own)

    @property
    def tensors(self) -> int:
        """Trained tensors: Z, D of two sides, sigma, and the guide's three, for each group."""
        return 8 * self.groups if self.bayesian else 2 * 2 * self.layers

    @property
    def parameter_bytes(self) -> int:
        """In single precision."""
        return 4 * self.numbers

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments, and a step count for each tensor."""
        return 8 * self.numbers + 4 * self.tensors

    def factor_bytes(self, draws: int) -> int:
        """What a step or a prediction holds of ``draws`` draws: Q, L and the cores ``V``."""
        if not self.bayesian:
            return 0
        r = self.r
        return 4 * self.layers * (r * self.sides + 2 * 2 * r * r + 2 * draws * r * r)

    def apply(self, tokens: int) -> float:
        """FLOPs of the update itself forward, ``2 N a L (r d + [2 r^2])``."""
        core = 2 * self.r**2 if self.bayesian else 0
        return 2.0 * tokens * self.layers * (self.r * self.sides + core)

    def whiten(self) -> float:
        """FLOPs of Psi = Z Z^T + D^2 and Q = L^-1 Z forward, ``3 a L r^2 d``; no token enters."""
        return 3.0 * self.layers * self.r**2 * self.sides if self.bayesian else 0.0


@dataclass(frozen=True)
class Task:
    """``B`` rows of ``T`` tokens through an adapted network whose head reads one position a row."""

    adapter: Adapter
    B: int
    T: int

    @property
    def tokens(self) -> int:
        """``N = B T``."""
        return self.B * self.T

    def linear(self, tokens: int) -> float:
        """FLOPs of the linear layers of all blocks, ``2 N L w``."""
        return 2.0 * tokens * self.adapter.shape.L * self.adapter.shape.block

    def attention(self, tokens: int) -> float:
        """FLOPs of the two products of attention, ``4 N T h L``."""
        return 4.0 * tokens * self.T * self.adapter.shape.h * self.adapter.shape.L

    def forward(self) -> float:
        """FLOPs of the frozen network, ``F``."""
        return self.linear(self.tokens) + self.attention(self.tokens)

    def head(self) -> float:
        """FLOPs of all logits, ``2 N v h``."""
        return 2.0 * self.tokens * self.adapter.shape.v * self.adapter.shape.h

    def plain(self) -> float:
        """FLOPs of the network's own forward, with all logits."""
        return self.forward() + self.head()

    @property
    def unread(self) -> float:
        """FLOPs of ``F`` that the last block need not do, ``s = 2 (N - B) (2 h^2 + 3 h f)``."""
        s = self.adapter.shape
        return 2.0 * (self.tokens - self.B) * (2 * s.h**2 + 3 * s.h * s.f)

    def updates(self, whole: bool = False) -> float:
        """FLOPs of all updates forward, ``u``; that of the last block's q at what is read."""
        r, unread = self.adapter.r, self.tokens - self.B
        own = 2 * self.adapter.shape.h * r + (r * r if self.adapter.bayesian else 0)
        return self.adapter.apply(self.tokens) - (0 if whole else 2.0 * unread * own)

    def step(self, checkpointing: bool = False) -> float:
        """FLOPs of a training step, ``F + F_b - 2 s`` and the adapter's, thrice its forward's.

        Under activation checkpointing the last block is run whole.
        """
        own = 3 * self.updates(checkpointing) + 10 / 3 * self.adapter.whiten()
        both = self.forward() + self.backward() + own
        again = self.adapter.share * self.forward() + self.updates(True)
        return both + (again if checkpointing else -2 * self.unread)

    def whole_step(self) -> float:
        """FLOPs of a step that computes the logits of all positions, as scripts do."""
        own = 3 * self.updates(True) + 10 / 3 * self.adapter.whiten()
        return self.plain() + self.backward() + self.head() + own

    def backward(self) -> float:
        """FLOPs of backward through the frozen network, ``F_b``.

        A frozen weight has no gradient, and nothing flows below the adapters: not into the blocks
        there, nor through q, k and v of the lowest adapted block.
        """
        a, s, N = self.adapter.share, self.adapter.shape, self.tokens
        lowest = 2.0 * N * (s.h**2 + 2 * s.h * s.k)
        return a * (self.linear(N) + 2.5 * self.attention(N)) - lowest

    def passes(self, draws: int, max_rows: int = 256) -> int:
        """How many passes ``draws`` take where one has at most ``max_rows`` rows, or one draw."""
        return -(-draws // max(1, max_rows // self.B))

    def prediction(self, draws: int) -> float:
        """FLOPs of ``S`` draws: the blocks below the adapters run once for a pass."""
        a, r, p = self.adapter.share, self.adapter.r, self.passes(draws)
        sampling = 2 * self.adapter.layers * 4.0 * r**3 * draws
        own = p * self.adapter.whiten() + draws * (self.updates() - self.unread) + sampling
        return (p * (1 - a) + draws * a) * self.forward() + own

    def linearised(self, classes: int) -> float:
        """FLOPs of the one-pass predictive: for each class but the first, backward to the cores."""
        own = self.updates() - self.unread
        return self.forward() + own + (classes - 1) * (self.backward() + own)

    def activations(self, checkpointing: bool = False) -> float:
        """Bytes kept for backward in a bfloat16 network, ``a L N (14 h + 4 k + 6 f)``.

        Less ``6 f (N - B)`` in the last block, unless checkpointed.
        """
        s, layers = self.adapter.shape, self.adapter.layers
        whole = self.tokens * (14 * s.h + 4 * s.k + 6 * s.f)
        if checkpointing:
            return layers * self.tokens * 2 * s.h + whole
        return layers * whole - 6.0 * s.f * (self.tokens - self.B)

    def training_bytes(self, kind: str, checkpointing: bool = False) -> float:
        """Memory of a training step: base, adapter, gradient, AdamW, factors, activations."""
        own = self.adapter
        state = 2 * own.parameter_bytes + own.optimizer_bytes + own.factor_bytes(self.B)
        return own.shape.base_bytes(kind) + state + self.activations(checkpointing)

    def prediction_bytes(self, kind: str, draws: int) -> float:
        """Memory of a prediction: base, adapter, factors, one block's outputs of one pass."""
        s = self.adapter.shape
        rows = self.B * -(-draws // self.passes(draws))
        own = self.adapter.parameter_bytes + self.adapter.factor_bytes(draws)
        return s.base_bytes(kind) + own + rows * self.T * (2 * s.h + 6 * s.f)

    def traffic(self, kind: str, passes: float) -> float:
        """Bytes of weights read in so many passes; quantised ones are written out in bfloat16."""
        once = self.adapter.shape.base_bytes(kind)
        if kind in ("int8", "int4"):
            once += 2 * 2 * self.adapter.shape.L * self.adapter.shape.block
        return passes * once
