"""Reports, plots and the paper's formulas about memory and time: what never travels with a checkpoint."""
