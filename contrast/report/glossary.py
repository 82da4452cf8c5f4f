"""One line on each technical term of the page."""

GLOSSARY = {
    "accuracy": "The share of samples that are classified correctly; 1 is all of them.",
    "AUROC": "The probability that a sample of a class gets a higher score for it than a sample of another class; "
    "0.5 is chance, 1 is perfect.",
    "balanced accuracy": "The mean of the accuracies of the classes, so that rare classes count as much as others.",
    "batch size": "The number of samples that are compared with each other in one step, over all processes.",
    "collapse": "The encoder returns (nearly) the same features for every sample, which then cannot be told apart.",
    "cosine similarity": "The cosine of the angle between two feature vectors: 1 the same direction, 0 orthogonal, "
    "-1 opposite.",
    "encoder": "The network that maps a sample to a vector of numbers, its features.",
    "features": "The vector that the encoder returns for a sample; all results are computed from it.",
    "fingerprint": "A hash of the data's content: another hash means other data.",
    "k-NN": "k nearest neighbours: a sample gets the class of most of the training samples with the most similar "
    "features. Nothing is trained.",
    "labels per class": "The probe is trained on this many labelled samples of each class only, drawn several times; "
    "the encoder itself uses no labels, unless its loss does.",
    "linear probe": "A linear classifier trained on the frozen features: it measures what can be read from them.",
    "loss": "What training minimises: views of the same sample should be similar, others not. Its value says little "
    "by itself, and cannot be compared between different losses or batch sizes.",
    "macro-F1": "The harmonic mean of precision and recall of each class, averaged over classes.",
    "off the shelf": "An encoder with published weights, not trained on these data.",
    "online probe": "A small classifier that measures the encoder during training, on samples held out from the "
    "training data; it cannot influence the encoder.",
    "pretrained": "The encoder after this run's training.",
    "raw input": "The samples themselves, without an encoder: what a probe reads from raw values.",
    "recall": "The share of a class's samples that are classified correctly.",
    "seed": "The number that determines every random choice; the same seed repeats the run.",
    "spread": "The uncertainty of a number; which kind it is, is written below the table.",
    "standard error": "The uncertainty of a mean: the standard deviation divided by the square root of the number of "
    "draws. A difference of more than twice its standard error is unlikely to be chance in the draws.",
    "step": "One update of the encoder's weights, after one batch.",
    "supervised": "The same network trained directly on the labels.",
    "t-SNE": "An embedding in the plane that keeps nearest neighbours close. Distances between groups and the sizes "
    "of groups have no meaning.",
    "temperature": "The divisor of the similarities in the loss: a small one emphasises the most similar samples.",
    "test": "Samples that were used for no training and no choice.",
    "untrained": "The same encoder with random weights: what its architecture achieves without training.",
    "view": "A randomly changed copy of a sample; two views of one sample should get similar features.",
}
