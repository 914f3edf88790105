"""How far clients' adapters are apart, for algorithms that gossip."""

from __future__ import annotations

from collections.abc import Mapping

from fedpref.federation.aggregation import Aggregate, Factors
from fedpref.federation.verbs import Client, Federation, PerClient, work
from fedpref.numerics.trees import BESIDE, Tree

VALUE, SQUARE = f"{BESIDE}value", f"{BESIDE}square"  # figures, which nothing shortens


@work("consensus.projected", reads=("theta",))
def projected(client: Client, theta: Tree, aggregate: Aggregate) -> Tree:
    """Return random sums of the adapter's entries, and their squares.

    They are the same sums in every round, or an adapter that stays could be solved for.
    """
    shadow = aggregate.shadow(theta, 0).double()
    return {VALUE: shadow, SQUARE: shadow.square()}


def consensus_error(
    fed: Federation, theta: PerClient[Tree], aggregate: Aggregate = Factors()
) -> float:
    """Return the mean over clients of |theta_i - mean|^2, estimated.

    The estimate is the variance over clients of random sums of each tensor's entries. Distances
    are between factors, or between the products that they stand for where these are mixed.

    Args:
        fed: The federation, whose `mean` weighs the clients.
        theta: Each client's adapter.
        aggregate: What is mixed, factors or products.
    """
    mean = fed.mean(fed.each(projected, theta, aggregate))
    # an estimate of zero can be slightly negative; what is no number stays none
    return max(float((mean[SQUARE] - mean[VALUE].square()).sum()), 0.0)


def consensus_metrics(
    fed: Federation,
    before: PerClient[Tree],
    after: PerClient[Tree],
    aggregate: Aggregate = Factors(),
) -> Mapping[str, float]:
    """Return the consensus error before mixing and after it, under their metrics' names."""
    return {
        "consensus_error": consensus_error(fed, after, aggregate),
        "consensus_error_before_mixing": consensus_error(fed, before, aggregate),
    }
