package main

import (
	"io"
	"os"
)

// inputVariable says that the parent process holds the other end of standard input for as long as it lives.
const inputVariable = "PETALS_WIN_P2PD_STDIN"

// watchInput ends the daemon at the end of standard input, if the parent has said that it holds it.
func watchInput(l *life) {
	if os.Getenv(inputVariable) != "1" {
		return
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		l.end("standard input was closed")
	}()
}
