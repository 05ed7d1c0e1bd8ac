"""
Twelve functions to write, four sittings, a little under four hours. Write one, then

    python exercises/check.py                 # of each: right, where the first number differs, or not written yet
    python exercises/check.py gptq            # of one

Inputs are torch tensors, in float64 but for counts, lengths and codes: compute in float64, and change no input. The
product has each of these functions, faster and with more settings; where it stands is named. Look there, or into
solutions.py, only after you have tried.
"""
import math

import torch
import torch.nn.functional as F


# ---- sitting 1: a GPT that knows facts (model.py)

def rotate(x, cos, sin):
    """1. Rotary positions, 10 minutes. (model.py: rotate)

    x (B, heads, T, hs), cos and sin (T, hs / 2) of the angles -> (B, heads, T, hs): each pair (x_i, x_{i + hs/2}) of
    a token turned in its plane by the angle of that token and pair:  (a, b) -> (a cos - b sin, b cos + a sin).

    By hand: one token (1, 2, 3, 4). The pairs are (1, 3) and (2, 4). Turn the first by 90 degrees (cos 0, sin 1) and
    the second not at all (cos 1, sin 0): (1, 3) -> (-3, 1), (2, 4) stays. Result (-3, 2, 1, 4).

    Stuck? x.chunk(2, dim=-1) gives all first members and all second members.
    """
    raise NotImplementedError


def attention(q, k, v):
    """2. Causal attention with grouped queries, 25 minutes. (model.py: Attention.forward)

    k, v (B, nkv, S, hs) of S tokens, q (B, nh, T, hs) of the last T of them -> (B, nh, T, hs). Query head h reads
    key/value head h // (nh / nkv). Query i is token S - T + i and attends to itself and to what stands before it:
    softmax over s of q_i . k_s / sqrt(hs), then the mean of the v_s under these probabilities.

    By hand: hs = 1, two tokens, T = S, q = (0, ln 3), k = (0, 1), v = (4, 8). Token 0 sees itself only: 4. Token 1 has
    the scores (0, ln 3), so the probabilities (1/4, 3/4): 0.25 * 4 + 0.75 * 8 = 7. Result (4, 7).

    Stuck? repeat_interleave repeats heads in the right order, repeat in the wrong one. torch.ones(T, S).triu(d) is one
    where column - row >= d.
    """
    raise NotImplementedError


def cached_attention(q, k, v, cache):
    """3. The same with a cache, 10 minutes. (engine/cache.py: Cache)

    q, k, v of T new tokens, cache (2, B, nkv, S, hs) the keys, then the values, of S tokens read before (S may be 0)
    -> (y (B, nh, T, hs), the cache of all S + T tokens). Reading a text token by token must give what reading it at
    once gives.

    By hand: the text above, token by token. First cache empty, q = 0, k = 0, v = 4: y = 4, cache ((0), (4)). Then
    q = ln 3, k = 1, v = 8: y = 7, cache ((0, 1), (4, 8)).

    Stuck? torch.stack([k, v]) has the cache's layout. Your `attention` does the rest.
    """
    raise NotImplementedError


# ---- sitting 2: compress it (compress.py, engine/)

def rtn(W, bits, group_size):
    """4. Rounding to nearest with groups, 20 minutes. (compress.py: rtn, engine/grids.py: grid, nearest)

    W (out, in), `in` a multiple of group_size -> (codes (out, in), scale (out, groups), zero (out, groups)). Each group
    of group_size neighbours in a row has a grid of 2**bits values scale * (code - zero) from its lowest weight, or 0 if
    that is lower, to its highest, or 0 if that is higher:

        scale = (high - low) / (2**bits - 1), or 1 where high = low = 0
        zero  = round(-low / scale)
        code  = round(w / scale) + zero, kept within 0 .. 2**bits - 1          halves are rounded to even

    By hand: W = (-1, 0, 2, 0.5), 2 bits, one group: scale 1, zero 1, codes (0, 1, 3, 1). 0.5 goes to 0, not to 1.

    Stuck? W.view(out, -1, group_size), amin and amax of the last dimension.
    """
    raise NotImplementedError


def second_moments(X, lengths):
    """5. What the data say, 10 minutes. (engine/layers.py: watched, which compress.py: calibrate calls)

    X (B, T, in) the inputs of a layer, lengths (B,) real tokens of each row; what stands behind them is padding ->
    H (in, in), the mean of x xᵀ over all real tokens (not over rows first).

    By hand: one row, X = ((1, 1), (1, 0), (9, 9)), length 2: x xᵀ is ((1, 1), (1, 1)) and ((1, 0), (0, 0)), the mean
    ((1, 0.5), (0.5, 0.5)).

    Stuck? A bool mask (B, T) picks the real tokens: X[mask] is (n, in).
    """
    raise NotImplementedError


def output_error(D, H):
    """6. What a change of the weight costs, 10 minutes, on paper first. (engine/layers.py: output_error)

    D (out, in) = W - Q, H (in, in) the mean of x xᵀ -> the mean of |D x|², a number: tr(D H Dᵀ).

    By hand: W = (0.6, 0.6), H = ((1, 0.9), (0.9, 1)), Q on the grid {0, 1}. Nearest takes Q = (1, 1), D = (-0.4, -0.4):
    0.16 + 0.16 + 2 * 0.9 * 0.16 = 0.608. And Q = (1, 0), D = (-0.4, 0.6): 0.16 + 0.36 - 2 * 0.9 * 0.24 = 0.088.

    Stuck? The trace of A Bᵀ is the sum of A * B, element by element.
    """
    raise NotImplementedError


def gptq(W, H, bits, damp=0.01):
    """7. GPTQ, Algorithm 1, 30 minutes. (compress.py: gptq_loop)

    W (out, in), H (in, in) -> (codes (out, in), scale (out, 1), zero (out, 1)), one grid a row: that of `rtn` of W as
    it was. H gets `damp` times the mean of its diagonal added to its diagonal; U is upper triangular, UᵀU = H⁻¹. Then
    for j = 0 .. in - 1:

        q_j       = the value of the grid nearest to w_j, as w_j is by now
        e         = (w_j - q_j) / U_jj
        w_j, ...  -= e * (U_jj, U_j,j+1, ...)           the columns that are still free make up for the error

    By hand: W = (0, 3, 1.4, 1.4), 2 bits, damp 0, H the identity except H_23 = H_32 = 0.9. The grid is 0, 1, 2, 3.
    0 and 3 are on it. 1.4 goes to 1, error 0.4; the last weight makes up for 0.9 of it, 1.4 + 0.36 = 1.76, and goes to
    2: codes (0, 3, 1, 2), error 0.088. `rtn` gives (0, 3, 1, 1), 0.608: the numbers of exercise 6.

    Stuck? torch.linalg.cholesky(torch.linalg.inv(H), upper=True). All rows of W at once: e is (out,). If all codes
    equal rtn's, the update has not reached W.
    """
    raise NotImplementedError


def keep_n_of_m(score, n, m):
    """8. An N:M mask, 20 minutes. (engine/grids.py: keep_largest)

    score (rows, in), none below 0 -> keep (rows, in) bool: of every m neighbours in a row the n with the highest score.
    Never more than n, also where scores are equal: then the first lose. A last group shorter than m counts as filled up
    with the lowest scores.

    By hand: score (5, 1, 1, 1, 2), n = 2, m = 4. Of the first four 5 stays, and one of three equal ones, the last:
    (1, 0, 0, 1). The last group is (2, and three that are not there): 2 stays. Result (1, 0, 0, 1, 1).

    Stuck? A threshold keeps too many where scores are equal; score.argsort(dim=-1, stable=True) does not.
    """
    raise NotImplementedError


def pack4(codes):
    """9. Eight codes in a word, 15 minutes. (engine/packing.py: to_words)

    codes (out, in) uint8 in 0 .. 15, `in` a multiple of 8 -> int32 words (out, in / 8): code i of a word stands in its
    bits 4 i .. 4 i + 3, so the first code is the lowest.

    By hand: (1, 2, 3, 4, 5, 6, 7, 0) -> 0x07654321 = 124076833. And (1, 2, 3, 4, 5, 6, 7, 8) -> 0x87654321, whose top
    bit is the sign of an int32: 2271560481 - 2**32 = -2023406815.

    Stuck? Shift in int64 (codes.long()), where nothing overflows, and make it an int32 in the end.
    """
    raise NotImplementedError


# ---- sitting 3: repair it (recover.py, idp.py)

def distillation(logits, log_p, tokens):
    """10. The loss of a repair, 20 minutes. (engine/losses.py: distillation)

    logits (B, T, V) of the student; of the teacher its k likeliest tokens (B, T, k) and their log-probabilities log_p
    (B, T, k) -> (B, T) in nats: KL(teacher || student) = sum of p log(p / q) over these tokens, and over one bucket for
    all other tokens, whose p and q are what is left of 1, at least 1e-6 each.

    By hand: V = 3, teacher (1/2, 1/4, 1/4), k = 2, student uniform: 1/2 ln(3/2) + 1/4 ln(3/4) + 1/4 ln(3/4) = 0.0589.

    Stuck? The student's probabilities come from a softmax over all V, not over the k. gather(-1, tokens) picks.
    """
    raise NotImplementedError


def mean_attention(q, k, keys, lengths):
    """11. The scores of inference-time dynamic prompting, 30 minutes. (idp.py: mean_attention)

    q, k (B, nh, T, hs) of the texts, keys (M, nh, P, hs) of M prompts of P tokens, lengths (B,) real tokens of each
    text -> (B, M): the mean attention probability that a text's real tokens pay to a prompt, over heads, over these
    tokens, and over the prompt's own P tokens. The softmax is over all prompts' tokens side by side and, causally, the
    text.

    By hand: hs = 1, P = 1, M = 2, one text token, q = 1, its own k = 0, the prompts' keys 0 and ln 2.
    Scores (0, ln 2, 0): probabilities 1/4, 1/2, 1/4, the last its own. Result (0.25, 0.5).

    Stuck? keys.transpose(0, 1).flatten(1, 2) is (nh, M P, hs). Mask only the text's part.
    """
    raise NotImplementedError


# ---- sitting 4: displaced or re-learned? (study/shares.py, study/statistics.py)

def displaced(right, draws):
    """12. Displaced with its paired interval, 30 minutes. (study/shares.py, study/statistics.py: share_of)

    right (people, 3) right answers of the dense, the compressed and the repaired model about each held-out person,
    draws (R, people) who is drawn in each of R resamples -> (3,): the share (repaired - compressed) / (dense -
    compressed) of all right answers, and the 2.5 and the 97.5 percentile of that share over the resamples. A resample
    draws the same people for all three models: that is what "paired" means. (Recalls are right answers over facts; all
    three are asked the same facts, so the number of facts cancels.)

    By hand: two people, right ((2, 0, 1), (2, 1, 2)): sums 4, 1, 3, displaced 2/3. The resample (0, 0): 4, 0, 2, share
    0.5. The resample (1, 1): 4, 2, 4, share 1. From these two resamples alone the percentiles stand between 0.5 and 1
    on a straight line: 0.5125 and 0.9875.

    Stuck? right[draws] is (R, people, 3). torch.quantile takes its q in the samples' dtype; or sort and interpolate at
    q (R - 1).
    """
    raise NotImplementedError
