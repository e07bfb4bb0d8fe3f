"""The merged weight: W + s·BA on the mask, rounded once."""
