import GuestPrograms
import Machine

/// What the VM knows about its built-in guests: `x-check-guest`, `x-query-guest`, `x-guest-histogram`, `x-reset-guest-gap`.
struct GuestCommands: Sendable {
    private let machine: VirtualMachine

    init(_ machine: VirtualMachine) { self.machine = machine }

    var all: [Command] {
        [
            Command("x-check-guest") { [machine] _ in try machine.checkGuest().json },
            Command("x-query-guest") { [machine] _ in try machine.guestStatus().json },
            Command("x-guest-histogram") { [machine] _ in try machine.guestHistogram().json },
            Command("x-reset-guest-gap") { [machine] _ in
                try machine.resetGuestGaps()
                return [:]
            },
        ]
    }
}

extension GuestCheck {
    var json: JSON {
        [
            "verified": .bool(isVerified), "summary": .string(description), "pages-checked": JSON(pagesChecked),
            "pages-unwritten": JSON(pagesUnwritten), "faulty-pages": JSON(faultyPages),
            "mismatched-tags": JSON(mismatchedTags), "damaged-pages": JSON(damagedPages),
            "stale-pages": JSON(stalePages), "premature-pages": JSON(prematurePages),
            "examples": .array(examples.map { .string($0.description) }), "status": status.json,
        ]
    }
}

extension GuestHistogram {
    var json: JSON { ["tsc-kilohertz": JSON(tscKilohertz), "counts": .array(counts.map { JSON($0) })] }
}

extension GuestStatus {
    var json: JSON {
        [
            "kind": .string(kind.name), "ready": .bool(isReady), "tsc-kilohertz": JSON(tscKilohertz),
            "cpus-expected": JSON(cpusExpected), "cpus-active": JSON(cpusActive), "touches": JSON(touches),
            "passes": JSON(passes), "heartbeats": JSON(heartbeats), "filled-pages": JSON(filledPages),
            "tsc-backwards": JSON(tscBackwards), "longest-gap-ticks": JSON(longestGapTicks),
            "cpus": .array(cpus.map(\.json)),
        ]
    }
}

extension GuestStatus.CPU {
    fileprivate var json: JSON {
        [
            "phase": .string("\(phase)"), "filled-pages": JSON(filledPages), "passes": JSON(passes),
            "touches": JSON(touches), "heartbeats": JSON(heartbeats), "longest-gap-ticks": JSON(longestGapTicks),
            "longest-gap-end": JSON(longestGapEnd), "long-gaps": JSON(longGaps),
            "latest-long-gaps": .array(latestLongGaps.map { ["ticks": JSON($0.ticks), "end": JSON($0.end)] }),
            "tsc-backwards": JSON(tscBackwards), "late-slices": JSON(lateSlices),
            "longest-access-ticks": JSON(longestAccessTicks), "last-tsc": JSON(lastTSC),
        ]
    }
}
