"""What serving and training share: no network, no database, no configuration of the node.

volume -> intensity -> networks -> package -> inference; projection and phantom make test input.
"""
