package main

func page(m machine, p plan, all results) string { return "" }
func picture(all results) string                 { return "" }
