//go:build unix && !linux

package main

import (
	"os"
	"time"
)

const parentCheck = time.Second

// watchParent ends the daemon when the parent process dies: it has another parent then.
func watchParent(l *life) {
	parent := os.Getppid()
	go func() {
		for range time.Tick(parentCheck) {
			if os.Getppid() != parent {
				l.end("the parent process has died")
				return
			}
		}
	}()
}
