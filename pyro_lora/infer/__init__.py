"""Model and batches -> posterior, which is a guide.

``auto_laplace`` is a MAP guide whose ``laplace_approximation`` fits a Gaussian around
the mode; ``svgd`` moves particles that repel one another; ``methods`` are those of
others that end in a Gaussian over the weights.
"""
