"""Show Theorem 3.1 of "Clustering the Sketch" (arXiv:2210.05974): least squares through few parameters.

    python examples/least_squares.py [--plot least_squares.png]

min ||X T - Y|| is solved by the paper's algorithms in steps; the table shows, after each, how much of the way from
T = 0 (1.0) to the best T (0.0) is left. The theorem bounds the dense algorithm alone. The sparse one, which keeps
as few parameters as a compressed embedding table, has no proof: it stalls, above k-means of the best T with
centroids fitted by least squares. The plot needs matplotlib (pip install 'cqr-compress[plot]').
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch
from torch import Tensor

from cqr_compress.clustering.least_squares import Problem, cluster_rows, dense_iterates, sparse_iterates


def refitted_kmeans(problem: Problem, num_clusters: int, seed: int) -> Tensor:
    """Cluster the rows of the best T, then solve for the centroids."""
    pointers, _ = cluster_rows(problem.best, num_clusters, seed)
    H = torch.nn.functional.one_hot(pointers, num_clusters).double()
    return H @ torch.linalg.lstsq(problem.X @ H, problem.Y, driver="gelsd").solution


def curves(problem: Problem, k: int, iterations: int, seed: int) -> dict[str, list[float]]:
    """Excess after each step, by method; straight lines for what has no steps."""
    steps = range(1, iterations + 1)
    found = {"bound (dense)": [problem.bound(i, k) for i in steps]}
    for name, iterates in (
        ("dense", dense_iterates(problem, k, seed)),
        ("dense, smart noise", dense_iterates(problem, k, seed, smart=True)),
        ("sparse", sparse_iterates(problem, k, seed)),
    ):
        found[name] = [problem.excess(T) for T in islice(iterates, iterations)]
    found["k-means of T*, refitted"] = [problem.excess(refitted_kmeans(problem, k, seed))] * iterations
    return found


def draw(found: dict[str, list[float]], title: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    styles = {"bound (dense)": "k--", "k-means of T*, refitted": ":"}
    for name, values in found.items():
        axes.plot(range(1, len(values) + 1), values, styles.get(name, "-"), label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("excess: (||XT - Y||² - least) / ||XT*||²")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(1, None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=3000, help="n, rows of X")
    parser.add_argument("--ids", type=int, default=500, help="d1, rows of T")
    parser.add_argument("--dim", type=int, default=10, help="d2, columns of T")
    parser.add_argument("--k", type=int, default=100, help="columns of the sketch")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", help="write a picture here")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    X = torch.randn(args.examples, args.ids, generator=generator)
    Y = X @ torch.randn(args.ids, args.dim, generator=generator)
    Y = Y + torch.randn(Y.shape, generator=generator)
    found = curves(Problem.of(X, Y), args.k, args.iterations, args.seed)
    title = f"n = {args.examples}, d1 = {args.ids}, d2 = {args.dim}, k = {args.k}"
    print(f"X and T Gaussian, Y = X T + noise, {title}")
    print(f"{'step':24}" + "".join(f"{i:>7}" for i in range(1, args.iterations + 1)))
    for name, values in found.items():
        print(f"{name:24}" + "".join(f"{value:7.3f}" for value in values))
    if args.plot:
        draw(found, title, args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
