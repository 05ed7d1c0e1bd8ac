"""
The same facts under two compressors: of those that both took from the same GPT, how many come back after each.

If one compressor's losses come back more easily than another's, there are two explanations: it damages facts in another
way, or it takes other facts, such as are easily brought back. Facts that both took tell the two apart: a difference
that is left on them is not caused by which facts were taken.

What is counted here is gross: facts that were lost and are right after the repair. Displaced is net, less what the
repair loses; so a repair that moves answers at random has a share above zero here, and a displaced of zero. Compressors
of the same operation are compared (rounding with rounding, pruning with pruning). Not planned before the runs:
exploratory.

What it leaves out: facts that the dense model does not know.
"""
from itertools import combinations

import numpy as np

from study.shares import means
from study.statistics import share_of


def same_facts(draws, facts, seed):
    """Rows of two compressors and one repair, each a dict:

    a, b              tags of the compressed models, and `repair`, the tag of what repairs both
    both, a_only, b_only     how many held-out facts were lost by both, or by one, over all draws
    back_a, back_b    the share of the facts lost by both that are right after the repair of a, and of b
    difference        back_a - back_b
    back_a_only, back_b_only     the share of those lost by one alone that are right after its repair
                      each [value, low, high] over people and draws; None where the interval of the number lost,
                      over people, touches zero

    draws  [rows] of the study's own group, the dense model first;  facts  the held-out facts, which each answered
    """
    rows = draws[0]
    right = np.array([[[a["correct"] for a in m["answers"]["heldout"]] for m in drawn] for drawn in draws], dtype=bool)
    known, place = right[:, 0], {(m["base"], m["tag"]): i for i, m in enumerate(rows)}  # (K, facts)
    damaged, out = [(i, m) for i, m in enumerate(rows) if m["kind"] == "compressed"], []
    for (i, a), (j, b) in combinations(damaged, 2):
        if a["operation"]["name"] != b["operation"]["name"]:
            continue
        of_a, of_b = known & ~right[:, i], known & ~right[:, j]  # lost by each
        lost = {"both": of_a & of_b, "a_only": of_a & ~of_b, "b_only": of_b & ~of_a}
        for tag in [tag for base, tag in place if base == a["id"] and (b["id"], tag) in place]:
            after_a, after_b = right[:, place[a["id"], tag]], right[:, place[b["id"], tag]]
            columns = [*lost.values(), lost["both"] & after_a, lost["both"] & after_b, lost["a_only"] & after_a,
                       lost["b_only"] & after_b]
            both, only_a, only_b, *back = means(np.stack(columns, axis=1).astype(float), facts, seed)
            shares = dict(zip(("back_a", "back_b", "back_a_only", "back_b_only"),
                              map(share_of, back, (both, both, only_a, only_b))))
            shares["difference"] = shares["back_a"] and shares["back_a"] - shares["back_b"]
            out.append({"a": a["tag"], "b": b["tag"], "repair": tag,
                        **{name: int(which.sum()) for name, which in lost.items()},
                        **{name: s and [float(s.value), *s.interval()] for name, s in shares.items()}})
    return out
