"""Metrics: FID, sFID, KID, Inception score, precision and recall, bits per dimension. See docs/evaluation.md."""

from cm_jax.evaluation.evaluate import EvalConfig, compare, evaluate
from cm_jax.evaluation.features import (
    FeatureExtractor,
    FeatureStatistics,
    load_inception,
    read_statistics,
    summarize,
    write_statistics,
)
from cm_jax.evaluation.image_sets import ImageSet, of_dataset, of_model, open_images
from cm_jax.evaluation.level_search import search_levels, tune
from cm_jax.evaluation.likelihood import bits_per_dimension, evaluate_bits, log_density
from cm_jax.evaluation.metrics import (
    Estimate,
    Gaussian,
    Moments,
    Overlap,
    Report,
    frechet_distance,
    inception_score,
    kernel_distance,
    overlap,
    squared_mmd,
    to_json,
)
from cm_jax.evaluation.neighbors import Neighbors, nearest
