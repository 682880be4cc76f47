"""Makes the helper modules beside it importable from the folders below, as pytest puts the folder
of a conftest on the import path."""
