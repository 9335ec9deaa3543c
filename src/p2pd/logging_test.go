package main

import (
	"bufio"
	"encoding/json"
	"log/slog"
	"regexp"
	"testing"

	golog "github.com/ipfs/go-log/v2"
	"github.com/libp2p/go-libp2p/gologshim"
)

var (
	timeForm   = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}(Z|[+-]\d{4})$`)
	callerForm = regexp.MustCompile(`\.go:\d+$`)
)

// hivemind parses every line with a "logger" in it, whichever library wrote it.
func TestLinesOfEveryLoggerCanBeParsed(t *testing.T) {
	setUpLogging()
	reader := golog.NewPipeReader(golog.PipeFormat(golog.JSONOutput), golog.PipeLevel(golog.LevelError))
	lines := bufio.NewScanner(reader)
	for name, write := range map[string]func(){
		"our own":            func() { log.Errorw("it failed", "error", "because") },
		"libp2p's":           func() { gologshim.Logger("a-library").Error("it failed", "error", "because") },
		"the default logger": func() { slog.Error("it failed", "error", "because") },
	} {
		go write()
		if !lines.Scan() {
			t.Fatalf("%s: no line: %v", name, lines.Err())
		}
		var line struct{ Level, TS, Logger, Caller, Msg, Error string }
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatalf("%s: %s: %v", name, lines.Text(), err)
		}
		if line.Level != "error" || line.Msg != "it failed" || line.Error != "because" || !timeForm.MatchString(line.TS) ||
			!callerForm.MatchString(line.Caller) {
			t.Errorf("%s: %s", name, lines.Text())
		}
	}
	if err := reader.Close(); err != nil {
		t.Error(err)
	}
}

func TestTheDHTDoesNotChatter(t *testing.T) {
	before, err := golog.SubsystemLevelName("dht")
	if err != nil {
		t.Fatal(err)
	}
	defer golog.SetLogLevel("dht", before)
	for at, want := range map[string]string{"info": "warn", "debug": "debug", "error": "error"} {
		if err := golog.SetLogLevel("dht", at); err != nil {
			t.Fatal(err)
		}
		setUpLogging()
		if got, _ := golog.SubsystemLevelName("dht"); got != want {
			t.Errorf("at %s it becomes %s", at, got)
		}
	}
}
