"""The command line: a saved adapter and a file of texts -> posterior, predictions.

It calls the package's public names only. ``commands`` are the commands and what is
printed, ``text_files`` what is read and written, ``saved_settings`` what the files of
posterior and adapter say without torch, ``saved_classifier`` the adapter with its base.
"""
