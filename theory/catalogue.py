"""All claims, in the order of the pages. What each says in one line is shortened; the pages have the assumptions."""

from .claims import Claim

__all__ = ["CLAIMS"]

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "C1",
        "complexity",
        "Matching makes exactly so many operations, chunked or not, for any number of rounds",
        ("complexity.check_matching_counts",),
    ),
    Claim("C2", "complexity", "So does k-means", ("complexity.check_kmeans_counts",)),
    Claim(
        "C3", "complexity", "So do attention, clustered attention, and means", ("complexity.check_attention_counts",)
    ),
    Claim(
        "C4",
        "complexity",
        "Chunked matching is linear in the tokens, un-chunked quadratic",
        ("complexity.check_count_exponents", "complexity.check_time_exponents"),
    ),
    Claim(
        "C5",
        "complexity",
        "Compression has paid for itself after about chunk_size / (6 group) generated tokens, by count",
        ("complexity.check_break_even", "complexity.check_break_even_in_time"),
    ),
    Claim(
        "P1",
        "partition",
        "If similarity falls with distance, no partition with as many sources beats the alternating one",
        ("partition.check_alternating",),
    ),
    Claim("P2", "partition", "Exactly these partitions are as good", ("partition.check_optimal_set",)),
    Claim(
        "P3",
        "partition",
        "Each source's nearest neighbours suffice; 3 tokens break it if similarity rises with distance, 4 if it varies",
        ("partition.check_nearest_neighbours", "partition.check_counterexamples"),
    ),
    Claim(
        "P4",
        "partition",
        "For stationary Gaussian keys the expected cosine has a closed form, and falls as their correlation does",
        ("stationary.check_expected_cosine",),
    ),
    Claim(
        "P5",
        "partition",
        "In expectation the alternating partition beats those that tie with it in P2: two neighbours to choose from",
        ("stationary.check_expected_partition",),
    ),
    Claim(
        "P6",
        "partition",
        "One round is the best of all many-to-one matchings of its halves; no clustering is below the least spread",
        ("optimal.check_optimal_matching", "optimal.check_optimal_clustering"),
    ),
    Claim(
        "P7",
        "partition",
        "SmolLM2: alternating beats random partitions in every head, though similarity does not fall all the way",
        ("optimal.check_real_keys",),
    ),
    Claim(
        "P8",
        "partition",
        "SmolLM2: larger chunks leave less spread, many small rounds more than few large ones",
        ("optimal.check_chunks_and_rounds",),
    ),
    Claim("M1", "merging", "With log counts, merging equal keys changes nothing", ("merging.check_equal_keys",)),
    Claim("M2", "merging", "A centroid never weighs more than its tokens", ("merging.check_jensen",)),
    Claim(
        "M3",
        "merging",
        "What it weighs less is half the variance of the logits, to second order",
        ("merging.check_gap",),
    ),
    Claim(
        "M4",
        "merging",
        "A merged pair's error has a closed form: to first order, key difference times value difference",
        ("merging.check_pair",),
    ),
    Claim(
        "M5",
        "merging",
        "Radii of keys and values certify the error of the output, for every query",
        ("certified.check_certificate", "certified.check_certificate_on_real_keys"),
    ),
    Claim("E1", "exactness", "Products of inputs are exact in float64", ("exactness.check_products",)),
    Claim(
        "E2",
        "exactness",
        "The halving sum is one expression",
        ("exactness.check_halving_sum", "exactness.check_torch_halving_sum"),
    ),
    Claim(
        "E3",
        "exactness",
        "The similarity is the same everywhere, and orders as the cosine does",
        ("exactness.check_bits_of_similarity", "exactness.check_order_of_similarity"),
    ),
    Claim(
        "E4",
        "exactness",
        "The filter's lead proves a match",
        ("exactness.check_filter", "exactness.check_margin", "exactness.check_matches"),
    ),
    Claim("E5", "exactness", "The filter's cut takes the right sources", ("exactness.check_cut",)),
    Claim("E6", "exactness", "Narrow sums do not depend on their order", ("exactness.check_sums",)),
    Claim("E7", "exactness", "Every backend ends with the reference's bits", ("exactness.check_decisions",)),
    Claim("E8", "exactness", "k-means ends with the reference's bits", ("recalling.check_kmeans",)),
    Claim(
        "E9",
        "exactness",
        "The filter's lead settles a selection",
        ("recalling.check_lead", "recalling.check_selection"),
    ),
    Claim(
        "R1",
        "recall",
        "The error is at most the attention left out times the distance of the values",
        ("recall.check_left_out",),
    ),
    Claim("R2", "recall", "Centroids and radii bound the attention left out", ("recall.check_mass",)),
    Claim("R3", "recall", "With centroids for the rest, the certificate of M5 holds", ("recall.check_stand_ins",)),
    Claim(
        "R4",
        "recall",
        "Ranking by score without log counts spends a budget of tokens best, as far as centroids tell",
        ("recall.check_greedy",),
    ),
)
