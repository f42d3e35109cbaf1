"""ENAT in JAX: image synthesis that encodes only the tokens revealed since the last step.

Source of the method: Ni et al., "ENAT: Rethinking Spatial-temporal Interactions in Token-based
Image Synthesis", NeurIPS 2024, arXiv 2411.06959 ("the paper") and the authors' PyTorch release
("the reference").

Dimension letters, the same in docstrings, einsums and shape comments:

    b  batch                     d  model width
    l  tokens of an image        h  attention heads
    n  newly revealed tokens     k  head dimension
    m  masked tokens             v  codebook size (number of codes)
    p  cached tokens             t  sampling steps

Layers, each importing only those above it (``tests/test_layers.py`` holds this):

    maths        reveal, shape_buckets, losses, fid, quality, costs, paper_costs,
                 moments, manifold, inception_score, bootstrap,
                 hlo_text, hlo_values, collectives, checksums
    networks     models/ (the only home of flax.linen)
    services     data/, sharding, optim, checkpoint, model_files, metric_writer,
                 monitoring, distributed, exits, agreement, manifest, preservation,
                 weight_files, torch_files, pickle_reader, hub, npz_files
    algorithm    train_state, train_step, tokenizer, tokenization, token_inspection, sampling,
                 tasks/, timing, profiling, loader_timing, scaling,
                 conversion, reference_sizes, inception_weights, features, image_statistics,
                 similarity, evaluation, measures
    product      generator, model_card, reveal_pictures, compiled_sampler, image_sets, cards
    programs     train, train_config, sample, tokenize_images, prepare, evaluate,
                 evaluate_arguments, evaluation_passes, evaluate_digits, export, import_torch,
                 analyze, plots, cli, benchmark, benchmark_arguments, timing_report,
                 profile_rows, profile_report, scaling_report
"""

__version__ = "0.1.0"
