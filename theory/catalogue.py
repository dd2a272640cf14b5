"""All claims, in the order of the pages, each in one sentence; the pages state the assumptions in full."""

from .claims import Claim

__all__ = ["CLAIMS"]

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "C1",
        "complexity",
        "Chunked soft matching takes exactly as many operations as its closed form says, for any chunk size "
        "and number of rounds",
        ("complexity.checks.check_matching_counts",),
    ),
    Claim(
        "C2",
        "complexity",
        "k-means takes exactly as many operations as its closed form says, for any number of rounds",
        ("complexity.checks.check_kmeans_counts",),
    ),
    Claim(
        "C3",
        "complexity",
        "Attention, clustered attention and the averaging of clusters take exactly as many operations as "
        "their closed forms say",
        ("complexity.checks.check_attention_counts",),
    ),
    Claim(
        "C4",
        "complexity",
        "Matching in chunks of a fixed size is linear in the tokens, matching in one chunk of all tokens is quadratic",
        ("complexity.checks.check_count_exponents", "complexity.checks.check_time_exponents"),
    ),
    Claim(
        "C5",
        "complexity",
        "By count, clustering a prompt has paid for itself after about chunk_size / (6 group) generated tokens",
        ("complexity.checks.check_break_even", "complexity.checks.check_break_even_in_time"),
    ),
    Claim(
        "C6",
        "complexity",
        "Pooled matching takes exactly as many operations as its closed form says, weighted means included",
        ("complexity.pooled.check_pooled_counts",),
    ),
    Claim(
        "C7",
        "complexity",
        "Pooled matching of n entries to t in chunks of c compares about c (n - t) / 2 pairs of keys, where a round of "
        "k-means compares n t",
        ("complexity.pooled.check_compared_pairs",),
    ),
    Claim(
        "C8",
        "complexity",
        "While decoding, compressing every interval + 1 tokens costs about "
        "(chunk_size + 12) / (8 group (interval + 1)) of what attention costs",
        ("complexity.pooled.check_decoding", "complexity.pooled.check_decoding_share"),
    ),
    Claim(
        "P1",
        "partition",
        "If similarity falls with distance, no partition of a chunk with as many sources beats the alternating one",
        ("partition.checks.check_alternating",),
    ),
    Claim(
        "P2",
        "partition",
        "If similarity falls strictly with distance, the optimal partitions are exactly those whose "
        "half-gaps, the runs of sources to each side of a destination, differ by at most 1",
        ("partition.checks.check_optimal_set",),
    ),
    Claim(
        "P3",
        "partition",
        "The alternating partition serves its sources best if every token is most similar to a neighbour; "
        "where similarity rises with distance 3 tokens suffice to make it lose, where it differs from place "
        "to place 4",
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
        "If on average a source matches better between two destinations than beside one, only the alternating "
        "partition and its mirror image have the largest expected value",
        ("partition.stationary.check_expected_partition",),
    ),
    Claim(
        "P6",
        "partition",
        "One round of soft matching is the best of all ways to send as many sources to one destination each; "
        "the spread that it leaves is at least that of the best clustering",
        ("partition.optimal.check_optimal_matching", "partition.optimal.check_optimal_clustering"),
    ),
    Claim(
        "P7",
        "partition",
        "In every head of SmolLM2 and of Gemma 3 that attends to everything, alternating sources match better than "
        "random ones, though similarity does not fall with distance all the way",
        ("partition.optimal.check_real_keys",),
    ),
    Claim(
        "P8",
        "partition",
        "In SmolLM2 and in Gemma 3 larger chunks leave less spread inside clusters, and rounds of two merges leave "
        "more than rounds that merge all they can",
        ("partition.optimal.check_chunks_and_rounds",),
    ),
    Claim(
        "P9",
        "partition",
        "Theorem 6.1, as a digest has it, follows from P1; that no token is more similar than a neighbour is enough, "
        "for the sum of the k best matches too",
        ("partition.convexity.check_nearest_is_enough", "partition.convexity.check_convex_optima"),
    ),
    Claim(
        "P10",
        "partition",
        "If similarity falls with distance and is convex, no partition has a larger sum over all pairs of a source and "
        "a destination than the alternating one; falling alone is not enough",
        (
            "partition.convexity.check_all_pairs",
            "partition.convexity.check_four_tokens",
            "partition.convexity.check_moving_windows",
        ),
    ),
    Claim(
        "P11",
        "partition",
        "A step of pooled matching merges the most similarity that any number of merges in each chunk can; if no token "
        "is more similar than a neighbour, no partitions with as many sources in each chunk do better",
        (
            "partition.pooled.check_pooled_cut",
            "partition.pooled.check_pooled_partitions",
            "partition.pooled.check_unlike_chunks",
            "partition.pooled.check_oldest_first",
        ),
    ),
    Claim(
        "P12",
        "partition",
        "One step of alternation leaves the least spread, up to one cluster at the end of a chunk; over several steps "
        "alternation is not optimal, convex similarity or not",
        (
            "partition.rounds.check_least_spread",
            "partition.rounds.check_first_step",
            "partition.rounds.check_runs",
            "partition.rounds.check_rounds",
        ),
    ),
    Claim(
        "M1",
        "merging",
        "With log counts, merging tokens with equal keys does not change the output of attention",
        ("merging.checks.check_equal_keys",),
    ),
    Claim(
        "M2",
        "merging",
        "A centroid with its log count never weighs more in attention than its tokens did",
        ("merging.checks.check_jensen",),
    ),
    Claim(
        "M3",
        "merging",
        "The logarithm of the weight that a centroid lacks beside its tokens is half the variance of their "
        "logits, to second order",
        ("merging.checks.check_gap",),
    ),
    Claim(
        "M4",
        "merging",
        "The error of a merged pair has a closed form: to first order, the difference of the keys along the "
        "query times the difference of the values",
        ("merging.checks.check_pair",),
    ),
    Claim(
        "M5",
        "merging",
        "The radii of clusters of keys and values give a bound on the error of clustered attention that holds "
        "for every query",
        ("merging.certified.check_certificate", "merging.certified.check_certificate_on_real_keys"),
    ),
    Claim(
        "E1",
        "exactness",
        "The product of two float16, bfloat16 or float32 numbers is exact in float64",
        ("exactness.checks.check_products",),
    ),
    Claim(
        "E2",
        "exactness",
        "A sum by halves has the same bits on every machine, and its error has a bound that grows with the "
        "logarithm of the number of terms",
        ("exactness.checks.check_halving_sum", "exactness.checks.check_torch_halving_sum"),
    ),
    Claim(
        "E3",
        "exactness",
        "The canonical similarity has the same bits on every machine, and orders pairs of keys as their cosine does",
        ("exactness.checks.check_bits_of_similarity", "exactness.checks.check_order_of_similarity"),
    ),
    Claim(
        "E4",
        "exactness",
        "A destination that leads in the float32 filter by more than the margin is the canonical match",
        ("exactness.checks.check_filter", "exactness.checks.check_margin", "exactness.checks.check_matches"),
    ),
    Claim(
        "E5",
        "exactness",
        "The cut by the float32 filter, with doubtful sources ordered by canonical similarity, takes the "
        "sources that the definition takes",
        ("exactness.checks.check_cut",),
    ),
    Claim(
        "E6",
        "exactness",
        "If the sizes of a chunk's numbers are not too far apart, the sums over its clusters have the same "
        "bits in any order",
        ("exactness.checks.check_sums",),
    ),
    Claim(
        "E7",
        "exactness",
        "Every backend computes labels, counts and centroids of soft matching with the reference's bits",
        ("exactness.checks.check_decisions",),
    ),
    Claim(
        "E8",
        "exactness",
        "Every backend computes labels, counts and centroids of k-means with the reference's bits",
        ("exactness.recalling.check_kmeans",),
    ),
    Claim(
        "E9",
        "exactness",
        "Clusters that lead in the float32 filter by more than a proven bound are selected, those that trail "
        "by as much are not, as canonical scores decide",
        ("exactness.recalling.check_lead", "exactness.recalling.check_selection"),
    ),
    Claim(
        "R1",
        "recall",
        "Attention to recalled tokens is wrong by at most the attention left out times the largest distance "
        "from a recalled value to one left out",
        ("recall.checks.check_left_out",),
    ),
    Claim(
        "R2",
        "recall",
        "Centroids, counts and radii bound the attention left out, without reading what was left out",
        ("recall.checks.check_mass",),
    ),
    Claim(
        "R3",
        "recall",
        "If centroids stand in for what is not recalled, the certificate of M5 bounds the error",
        ("recall.checks.check_stand_ins",),
    ),
    Claim(
        "R4",
        "recall",
        "Ranking clusters by score without log counts spends a budget of tokens best, as far as centroids tell",
        ("recall.checks.check_greedy",),
    ),
)
