"""What runs inside the network: scorers, selectors, mergers, stages, backbones, budget and cost."""

if __name__ == "modules":
    raise ImportError("import laconic.modules, not modules: from the repository's root the bare name makes a second copy")
