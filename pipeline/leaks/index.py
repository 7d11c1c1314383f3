"""One index over the local features of many images, in which each feature votes for the images it may be from."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from pipeline.leaks.features import MIRROR, Bag, either_polarity


class Candidates(NamedTuple):
    """The shortlist of a batch, (n,) each, sorted by query: rows of query and reference, whether mirrored, and whether one is
    the other's negative."""

    query: np.ndarray
    match: np.ndarray
    mirror: np.ndarray
    negative: np.ndarray


EXACT = 20_000  # up to this many index entries a flat index is fast enough, and misses nothing
PROBES = 4
NEIGHBOURS = 8
ARRAYS = "arrays.safetensors"
VOTES = 3  # a candidate has at least this many, and this many of one accord about where the one image lies in the other
ACCORD = 0.07  # in units of the longest side
SHORTLIST = 10  # candidates per query image before they must be of one accord
EVERY, HINT = 3, 2
"""Every third feature of a large image is searched for first, and the others where HINT votes of these are of one accord, or
one is for a small image: so an image that is no copy mostly costs a third. docs/dedup.md says what is lost."""


class VotingIndex:
    """One index over the features of all reference images; each query feature votes for the images of its nearest neighbours.

    Every descriptor is entered twice, as it is and mirrored, so that one search finds copies and mirrored copies. Entries and
    queries that negatives would have are turned to those of the positive, so that it finds negatives as well. Beyond
    EXACT entries the index is an inverted file of 4-bit product codes of 64 principal components: 16 bytes and an id
    per entry.
    """

    def __init__(self, index: Any, owner: np.ndarray, points: np.ndarray, turned: np.ndarray, large: np.ndarray) -> None:
        """`owner`: (descriptors,) int32, the reference row of each; `points`: (descriptors, 4) float16, as in Features; `turned`:
        (2 descriptors,) bool, which entries are those of a negative; `large`: (descriptors,) bool, those of large images.

        Entry 2 d of the index is descriptor d, entry 2 d + 1 its mirror image.
        """
        self.index, self.owner, self.points, self.turned, self.large = index, owner, points, turned, large

    @classmethod
    def build(cls, count: int, parts: Iterable[Bag], sample: np.ndarray, large: np.ndarray | None = None) -> "VotingIndex":
        """`parts` holds `count` features in all; `sample`, (m, 128) of their descriptors, trains the codes; `large`: (rows,)
        bool, the reference images of at least `features.LOOK` pixels; None: none of them."""
        index = _empty_index(2 * count, sample)
        owner, points, turned = np.empty(count, np.int32), np.empty((count, 4), np.float16), np.empty(2 * count, bool)
        n = 0
        for part in parts:
            both = np.stack([part.descriptors, part.descriptors[:, MIRROR]], 1).reshape(-1, 128)
            end = n + len(part.owner)
            both, turned[2 * n : 2 * end] = either_polarity(both)
            index.add(both.astype(np.float32))
            owner[n:end], points[n:end] = part.owner, part.points
            n = end
        return cls(index, owner, points, turned, np.zeros(count, bool) if large is None else large[owner])

    def save(self, folder: Path) -> None:
        import faiss

        faiss.write_index(self.index, str(folder / "index.faiss"))
        kept = {"owner": self.owner, "points": self.points, "turned": self.turned, "large": self.large}
        safetensors.numpy.save_file(kept, folder / ARRAYS)  # np.save does not say that the disk is full

    @classmethod
    def load(cls, folder: Path) -> "VotingIndex":
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.read_index(str(folder / "index.faiss"))
        kept = safetensors.numpy.load_file(folder / ARRAYS)
        return cls(index, **kept)

    def shortlist(self, queries: Bag, exclude: np.ndarray | None = None, large: np.ndarray | None = None) -> Candidates:
        """The reference images that the queries share features with, at most SHORTLIST each, the likeliest first.

        `exclude`: the reference row that each query row shall not find (itself), where queries and reference are the same images.
        `large`: (rows,) bool, the query images of at least `features.LOOK` pixels; None: none of them.
        """
        rows = np.arange(len(queries.owner))
        if large is None or len(self.turned) <= EXACT:
            return self._candidates(self._votes(queries, rows, exclude), queries, VOTES)
        early = (rows - np.searchsorted(queries.owner, queries.owner)) % EVERY == 0
        votes = self._votes(queries, rows[early], exclude)
        for_small = votes.query[~self.large[votes.voted]]
        hinted = np.unique(np.concatenate([self._candidates(votes, queries, HINT).query, for_small, np.flatnonzero(~large)]))
        late = self._votes(queries, rows[~early & np.isin(queries.owner, hinted)], exclude)
        votes = votes.where(np.isin(votes.query, hinted))
        both = _Votes(*(np.concatenate(columns) for columns in zip(votes, late, strict=True)))
        return self._candidates(both.where(np.argsort(both.feature, kind="stable")), queries, VOTES)

    def _candidates(self, votes: "_Votes", queries: Bag, least: int) -> Candidates:
        return _of_one_accord(votes.where(_likeliest(votes, least)), queries.points, self.points, least)

    def _votes(self, queries: Bag, rows: np.ndarray, exclude: np.ndarray | None) -> "_Votes":
        """Of the features in (n,) `rows`, ascending; by feature, and then by distance."""
        if not len(rows) or not len(self.owner):
            none = np.zeros(0, np.int64)
            return _Votes(none, none, none, none, none, none, np.zeros(0, np.float32))
        descriptors, turned = either_polarity(queries.descriptors[rows])
        distance, entry = self.index.search(descriptors.astype(np.float32), NEIGHBOURS + 1)
        weight = np.maximum(distance[:, -1:] - distance[:, :-1], 0)  # a neighbour no nearer than the others says nothing
        weight /= np.maximum(weight[:, :1], 1e-6)
        feature, rank = np.nonzero(entry[:, :-1] >= 0)
        entry = entry[feature, rank]
        query, match = queries.owner[rows[feature]].astype(np.int64), self.owner[entry >> 1].astype(np.int64)
        negative = (turned[feature] != self.turned[entry]).astype(np.int64)
        votes = _Votes(query, match, entry & 1, negative, rows[feature], entry >> 1, weight[feature, rank])
        return votes if exclude is None else votes.where(exclude[query] != match)


class _Votes(NamedTuple):
    """One row per vote: image rows of query and reference, whether mirrored, whether a negative, feature rows of both, weight."""

    query: np.ndarray
    match: np.ndarray
    mirror: np.ndarray
    negative: np.ndarray
    feature: np.ndarray
    voted: np.ndarray
    weight: np.ndarray

    def where(self, kept: np.ndarray) -> "_Votes":
        return _Votes(*(column[kept] for column in self))

    def pair(self) -> np.ndarray:
        """(n,) int64, one number for each (query, match, mirror, negative)."""
        return (self.query * (int(self.match.max(initial=0)) + 1) + self.match) * 4 + 2 * self.mirror + self.negative


def _empty_index(entries: int, sample: np.ndarray) -> Any:
    import faiss

    faiss.omp_set_num_threads(1)  # k-means and search give the same bits whatever the number of cores
    if entries <= EXACT:
        return faiss.IndexFlatL2(128)
    lists = round(entries**0.5)  # then finding the lists costs about as much as reading PROBES of them
    index = faiss.index_factory(128, f"PCA64,IVF{lists},PQ32x4fs")
    inverted: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
    inverted.nprobe = PROBES
    inverted.cp.niter = 8
    inverted.cp.min_points_per_centroid = 1
    wanted = max(64 * lists, 20_000)
    step = max(1, len(sample) // wanted)
    index.train(sample[::step].astype(np.float32))
    return index


def _likeliest(votes: _Votes, least: int) -> np.ndarray:
    """The rows of the votes for the SHORTLIST best candidates of each query, candidate by candidate.

    A feature votes once for a candidate, with its nearest neighbour there; a candidate needs `least` votes.
    """
    pair = votes.pair()
    order = np.argsort(pair, kind="stable")  # votes come by feature and then by distance, and stay so within a pair
    pair, feature = pair[order], votes.feature[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (pair[1:] != pair[:-1]) | (feature[1:] != feature[:-1])
    order, pair = order[fresh], pair[fresh]
    start = np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]]) if len(pair) else np.zeros(0, np.int64)
    count = np.diff(np.r_[start, len(pair)])
    weight = np.add.reduceat(votes.weight[order].astype(np.float64), start) if len(start) else np.zeros(0)
    enough = np.flatnonzero(count >= least)
    query = votes.query[order[start[enough]]]
    ranked = np.lexsort((enough, -weight[enough], query))
    place = np.arange(len(ranked)) - np.searchsorted(query[ranked], query[ranked])
    chosen = enough[ranked[place < SHORTLIST]]
    return order[ranges(start[chosen], count[chosen])]


def ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (count[0] of them), start[1], ..."""
    ends = np.cumsum(count)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - (ends - count), count)


def _of_one_accord(votes: _Votes, query_points: np.ndarray, reference_points: np.ndarray, least: int) -> Candidates:
    """The candidates with `least` votes that one similarity explains.

    Every vote proposes the similarity of its two keypoints, as in `align`; this throws out nearly all candidates that
    share no more than a texture.
    """
    pair = votes.pair()
    start = np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]]) if len(pair) else np.zeros(0, np.int64)
    count = np.diff(np.r_[start, len(pair)])
    p, q = reference_points[votes.voted].astype(np.float64), query_points[votes.feature].astype(np.float64)
    flip = np.where(votes.mirror, -1.0, 1.0)  # mirrored about x = 0: the shift makes up for the width
    zp, zq = flip * p[:, 0] + 1j * p[:, 1], q[:, 0] + 1j * q[:, 1]
    angle = np.where(votes.mirror, np.pi - p[:, 3], p[:, 3]) + np.pi * votes.negative
    scale = q[:, 2] / p[:, 2]
    turn = scale * np.exp(1j * (q[:, 3] - angle))
    i = np.repeat(np.arange(len(pair)), np.repeat(count, count))
    j = ranges(np.repeat(start, count), np.repeat(count, count))
    off = np.abs(turn[i] * (zp[j] - zp[i]) - (zq[j] - zq[i]))
    support = np.bincount(i, off < ACCORD * np.minimum(scale, 1)[i], len(pair))
    best = np.maximum.reduceat(support, start) if len(start) else np.zeros(0)
    kept = start[best >= least]
    return Candidates(votes.query[kept], votes.match[kept], votes.mirror[kept] > 0, votes.negative[kept] > 0)
