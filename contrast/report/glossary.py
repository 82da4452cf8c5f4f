"""The words of the page that a reader may not know, a line each."""

GLOSSARY = {
    "accuracy": "The share of samples whose class is named right; 1 is all of them.",
    "AUROC": "The chance that a sample of a class is ranked above one of another class; 0.5 is guessing, 1 is perfect.",
    "balanced accuracy": "Accuracy of each class by itself, then averaged, so that rare classes count as others do.",
    "batch size": "How many samples are compared with each other in one step, over all processes.",
    "collapse": "The encoder gives (nearly) the same features for every sample, so that nothing can be told apart.",
    "cosine similarity": "How far two feature vectors point the same way: 1 the same way, 0 unrelated, -1 opposite.",
    "encoder": "The network that turns a sample into a short list of numbers, its features.",
    "faulty": "A sample whose two views seem not to belong together: its loss was always large.",
    "features": "The numbers that the encoder gives for a sample; everything here is measured on them.",
    "fingerprint": "A short code of the data's content: another code means other data.",
    "k-NN": "k nearest neighbours: a sample gets the class that most of the training samples with the most similar "
    "features have. Nothing is trained.",
    "labels a class": "The probe is trained on so many labelled samples of each class only, drawn several times; the "
    "encoder itself never saw a label, unless its loss uses them.",
    "linear probe": "A linear classifier trained on the frozen features: it shows what the features hold ready.",
    "loss": "What training makes small: views of the same sample should be similar, others not. Its height says "
    "little by itself, and cannot be compared between different losses or batch sizes.",
    "macro-F1": "The balance of wrong alarms and misses of each class, then averaged over classes.",
    "noisy": "A sample whose views are alike without telling anything, such as noise: its loss was always small.",
    "off the shelf": "An encoder with published weights, not trained on these data.",
    "online probe": "A small classifier that watches the encoder during training, on samples held out from the "
    "training data; it cannot influence the encoder.",
    "PCA": "Principal components: the directions in which the features vary most.",
    "pretrained": "The encoder after this run's training.",
    "raw input": "The samples as they are, without any encoder: what a probe reads from bare values.",
    "recall": "Of the samples of a class, the share that is named right.",
    "seed": "The number that fixes every random choice; the same seed gives the same run.",
    "spread": "How far results differ between draws of the labelled samples, as their standard deviation.",
    "standard error": "How uncertain a mean is: the spread divided by the root of the number of draws. A difference "
    "of more than twice its standard error is hardly chance in the draws.",
    "step": "One change of the encoder's weights, after one batch.",
    "supervised": "The same network trained directly on the labels.",
    "t-SNE": "A way to lay points out in the plane that keeps near neighbours near. Distances between far groups, "
    "and the sizes of groups, mean nothing.",
    "temperature": "Divides the similarities in the loss: a small one makes it look at the most similar samples most.",
    "test": "Samples that were kept out of all training and all choices.",
    "untrained": "The same encoder with random weights: what its architecture gives for free.",
    "view": "A randomly changed copy of a sample; two views of one sample should get similar features.",
}
