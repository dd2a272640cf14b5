"""All claims, in the order of the pages. What each says in one line is shortened; the pages have the assumptions."""

from .claims import Claim

__all__ = ["CLAIMS"]

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "C1",
        "complexity",
        "Matching makes exactly so many operations, chunked or not, for any number of rounds",
        ("complexity.checks.check_matching_counts",),
    ),
    Claim("C2", "complexity", "So does k-means", ("complexity.checks.check_kmeans_counts",)),
    Claim(
        "C3",
        "complexity",
        "So do attention, clustered attention, and means",
        ("complexity.checks.check_attention_counts",),
    ),
    Claim(
        "C4",
        "complexity",
        "Chunked matching is linear in the tokens, un-chunked quadratic",
        ("complexity.checks.check_count_exponents", "complexity.checks.check_time_exponents"),
    ),
    Claim(
        "C5",
        "complexity",
        "Compression has paid for itself after about chunk_size / (6 group) generated tokens, by count",
        ("complexity.checks.check_break_even", "complexity.checks.check_break_even_in_time"),
    ),
    Claim(
        "P1",
        "partition",
        "If similarity falls with distance, no partition with as many sources beats the alternating one",
        ("partition.checks.check_alternating",),
    ),
    Claim("P2", "partition", "Exactly these partitions are as good", ("partition.checks.check_optimal_set",)),
    Claim(
        "P3",
        "partition",
        "Each source's nearest neighbours suffice; 3 tokens break it if similarity rises with distance, 4 if it varies",
        ("partition.checks.check_nearest_neighbours", "partition.checks.check_counterexamples"),
    ),
    Claim(
        "P4",
        "partition",
        "For stationary Gaussian keys the expected cosine has a closed form, and falls as their correlation does",
        ("partition.stationary.check_expected_cosine",),
    ),
    Claim(
        "P5",
        "partition",
        "In expectation the alternating partition beats those that tie with it in P2: two neighbours to choose from",
        ("partition.stationary.check_expected_partition",),
    ),
    Claim(
        "P6",
        "partition",
        "One round is the best of all many-to-one matchings of its halves; no clustering is below the least spread",
        ("partition.optimal.check_optimal_matching", "partition.optimal.check_optimal_clustering"),
    ),
    Claim(
        "P7",
        "partition",
        "SmolLM2: alternating beats random partitions in every head, though similarity does not fall all the way",
        ("partition.optimal.check_real_keys",),
    ),
    Claim(
        "P8",
        "partition",
        "SmolLM2: larger chunks leave less spread, many small rounds more than few large ones",
        ("partition.optimal.check_chunks_and_rounds",),
    ),
    Claim("M1", "merging", "With log counts, merging equal keys changes nothing", ("merging.checks.check_equal_keys",)),
    Claim("M2", "merging", "A centroid never weighs more than its tokens", ("merging.checks.check_jensen",)),
    Claim(
        "M3",
        "merging",
        "What it weighs less is half the variance of the logits, to second order",
        ("merging.checks.check_gap",),
    ),
    Claim(
        "M4",
        "merging",
        "A merged pair's error has a closed form: to first order, key difference times value difference",
        ("merging.checks.check_pair",),
    ),
    Claim(
        "M5",
        "merging",
        "Radii of keys and values certify the error of the output, for every query",
        ("merging.certified.check_certificate", "merging.certified.check_certificate_on_real_keys"),
    ),
    Claim("E1", "exactness", "Products of inputs are exact in float64", ("exactness.checks.check_products",)),
    Claim(
        "E2",
        "exactness",
        "The halving sum is one expression",
        ("exactness.checks.check_halving_sum", "exactness.checks.check_torch_halving_sum"),
    ),
    Claim(
        "E3",
        "exactness",
        "The similarity is the same everywhere, and orders as the cosine does",
        ("exactness.checks.check_bits_of_similarity", "exactness.checks.check_order_of_similarity"),
    ),
    Claim(
        "E4",
        "exactness",
        "The filter's lead proves a match",
        ("exactness.checks.check_filter", "exactness.checks.check_margin", "exactness.checks.check_matches"),
    ),
    Claim("E5", "exactness", "The filter's cut takes the right sources", ("exactness.checks.check_cut",)),
    Claim("E6", "exactness", "Narrow sums do not depend on their order", ("exactness.checks.check_sums",)),
    Claim("E7", "exactness", "Every backend ends with the reference's bits", ("exactness.checks.check_decisions",)),
    Claim("E8", "exactness", "k-means ends with the reference's bits", ("exactness.recalling.check_kmeans",)),
    Claim(
        "E9",
        "exactness",
        "The filter's lead settles a selection",
        ("exactness.recalling.check_lead", "exactness.recalling.check_selection"),
    ),
    Claim(
        "R1",
        "recall",
        "The error is at most the attention left out times the distance of the values",
        ("recall.checks.check_left_out",),
    ),
    Claim("R2", "recall", "Centroids and radii bound the attention left out", ("recall.checks.check_mass",)),
    Claim(
        "R3", "recall", "With centroids for the rest, the certificate of M5 holds", ("recall.checks.check_stand_ins",)
    ),
    Claim(
        "R4",
        "recall",
        "Ranking by score without log counts spends a budget of tokens best, as far as centroids tell",
        ("recall.checks.check_greedy",),
    ),
)
