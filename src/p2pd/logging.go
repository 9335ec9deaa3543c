package main

import (
	golog "github.com/ipfs/go-log/v2"
	"github.com/libp2p/go-libp2p/gologshim"
)

// log writes to stderr, in the format and at the level that GOLOG_LOG_FMT and GOLOG_LOG_LEVEL ask for.
var log = golog.Logger("p2pd")

// setUpLogging sends libp2p's own lines through the same logger: left alone they have no caller and too many digits
// in their time, which hivemind cannot parse.
func setUpLogging() { gologshim.SetDefaultHandler(golog.SlogHandler()) }
