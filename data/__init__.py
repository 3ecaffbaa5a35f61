"""LightningDataModules over Hugging Face datasets, and the embedded data sets."""

if __name__ == "data":
    raise ImportError("import laconic.data, not data: from the repository's root the bare name makes a second copy")
