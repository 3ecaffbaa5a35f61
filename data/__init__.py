"""LightningDataModules over Hugging Face datasets, and the data sets that come with Laconic."""

if __name__ == "data":
    raise ImportError("import laconic.data instead of data: from the repository's root, `data` would load a second copy of the package")
