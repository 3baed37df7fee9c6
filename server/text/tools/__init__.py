"""Tool calls: tools in prompts, and parsers and grammars of models' calls."""
