"""What is known of the tokens of a forward, and what moves them: state, decisions, trace, gathering, bypass, restore."""
