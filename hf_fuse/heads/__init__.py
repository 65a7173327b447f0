"""Classifiers on the features of a frozen encoder, with scikit-learn's interface.

Features come from :class:`~hf_fuse.heads.features.EncoderFeatures` or from anywhere else. Every head is saved with
``save_pretrained`` as one file; those that are linear become the last layer of a classifier of transformers
(:mod:`hf_fuse.heads.linear`).
"""

# Head -> its module in this folder. What a saved head may be.
HEADS = {
    "NearestMean": "nearest_mean",
    "Teen": "teen",
    "Analytic": "analytic",
    "NaiveBayes": "naive_bayes",
    "Simplex": "simplex",
    "MomentProbing": "moment_probing",
    "GbNn": "gb_nn",
    "Sdm": "sdm",
    "PredictionMarket": "prediction_market",
    "Concatenated": "concatenated",
    "Bonsai": "bonsai",
    "Cosmo": "cosmo",
    "LabelSetOperations": "label_sets",
}
# Those with another head or a model inside.
OTHERS = {"Loki": "loki", "Levi": "levi"}
