"""Our backbones in other frameworks, one file each. Importing one of them imports that framework; importing this package imports none."""
