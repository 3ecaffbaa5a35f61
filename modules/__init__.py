"""The code that runs inside the network: scorers, selectors, mergers, stages, backbones, budget and cost."""

if __name__ == "modules":
    raise ImportError("import laconic.modules, not modules: the bare name, found from the repository root, would load a second copy")
