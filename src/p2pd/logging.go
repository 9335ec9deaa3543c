package main

import (
	"log/slog"

	golog "github.com/ipfs/go-log/v2"
	"github.com/libp2p/go-libp2p/gologshim"
)

// log writes to stderr, in the format and at the level that GOLOG_LOG_FMT and GOLOG_LOG_LEVEL ask for.
var log = golog.Logger("p2pd")

// setUpLogging sends the lines of all libraries through one logger: left alone, libp2p's have no caller and too many
// digits in their time, and hivemind cannot parse them.
func setUpLogging() {
	slog.SetDefault(slog.New(golog.SlogHandler()))
	gologshim.SetDefaultHandler(golog.SlogHandler())
	// At the level "info", kad-dht v0.42 logs a peer ID where a key is expected, and the logger reports that as an
	// error of the program, several times a minute.
	if level, err := golog.SubsystemLevelName("dht"); err == nil && level == "info" {
		if err := golog.SetLogLevel("dht", "warn"); err != nil {
			log.Warnw("the DHT's log level stays as it is", "error", err)
		}
	}
}
