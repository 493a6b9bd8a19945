"""Plans whose stages are shared: ranges of layers that machines hold in parallel, chosen by what is served."""
