package main

import (
	"errors"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/windows"
)

// watchSurroundings ends the daemon on Ctrl+Break and when the console, the session or the parent process goes.
func watchSurroundings(l *life) {
	watchConsole(l)
	watchParent(l)
	watchInput(l)
}

// watchConsole tells Ctrl+Break, which is sent to a process on purpose, from Ctrl+C, which a console sends to all of
// its processes. os/signal reports both as the same.
func watchConsole(l *life) {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		for s := range signals {
			if s == os.Interrupt {
				l.interrupt()
				continue
			}
			l.end(s.String())
		}
	}()
	setHandler := windows.NewLazySystemDLL("kernel32.dll").NewProc("SetConsoleCtrlHandler")
	// Handlers are asked last come, first served; 0 passes the event on to os/signal.
	onEvent := windows.NewCallback(func(event uint32) uintptr {
		if event != windows.CTRL_BREAK_EVENT {
			return 0
		}
		l.end("Ctrl+Break")
		return 1
	})
	if ok, _, err := setHandler.Call(onEvent, 1); ok == 0 {
		log.Warnw("Ctrl+Break cannot be handled", "error", err)
	}
}

// watchParent ends the daemon when the parent process ends.
func watchParent(l *life) {
	parent, err := openParent()
	if err != nil {
		log.Warnw("the parent process cannot be watched", "error", err)
		return
	}
	go func() {
		defer windows.CloseHandle(parent)
		if _, err := windows.WaitForSingleObject(parent, windows.INFINITE); err != nil {
			log.Warnw("the parent process cannot be watched", "error", err)
			return
		}
		l.end("the parent process has died")
	}()
}

var errOtherProcess = errors.New("its process ID belongs to a younger process")

// openParent opens the process that started this one, unless it is gone and its ID has been given to another.
func openParent() (windows.Handle, error) {
	const rights = windows.SYNCHRONIZE | windows.PROCESS_QUERY_LIMITED_INFORMATION
	parent, err := windows.OpenProcess(rights, false, uint32(os.Getppid()))
	if err != nil {
		return 0, err
	}
	born, err := startTime(parent)
	if err == nil {
		var own int64
		if own, err = startTime(windows.CurrentProcess()); err == nil && born > own {
			err = errOtherProcess
		}
	}
	if err != nil {
		return 0, errors.Join(err, windows.CloseHandle(parent))
	}
	return parent, nil
}

func startTime(process windows.Handle) (int64, error) {
	var creation, exit, kernel, user windows.Filetime
	err := windows.GetProcessTimes(process, &creation, &exit, &kernel, &user)
	return creation.Nanoseconds(), err
}

func isAddrInUse(err error) bool {
	// WSAEACCES is what Windows says for a port that another program holds exclusively.
	return errors.Is(err, windows.WSAEADDRINUSE) || errors.Is(err, windows.WSAEACCES)
}

// privateUmask has no counterpart here: Unix sockets get the access rights of their folder.
func privateUmask() (restore func()) { return func() {} }
