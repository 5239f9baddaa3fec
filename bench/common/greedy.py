"""How benchmarks have tokens chosen."""

from __future__ import annotations

from internvl_edge.runtime import Sampling

#: Greedy, a pass for each token: so that times are those of passes, and answers, to the last bit of
#: their logits, do not depend on them.
ONE_BY_ONE = Sampling(speculate=0)
