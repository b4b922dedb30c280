"""The command line: a saved adapter and a file of texts -> posterior, predictions.

It calls the package's public names only. ``commands`` are the commands and what is
printed, ``text_files`` what is read and written, ``saved_classifier`` a saved adapter
with its base.
"""
