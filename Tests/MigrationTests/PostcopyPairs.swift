import GuestMemory
import Host
import TestSupport
import Testing
import Transport

@testable import Migration

// Two Godwits, of which one takes the other's guest by postcopy.

extension Migrator {
    /// A guest that precopy alone would not move soon.
    static let busyGuest = "dirty,working-set=4M,fill=24M,random,rate=200M"

    /// What both sides are told.
    struct PairTerms: Sendable, Codable, CustomTestStringConvertible {
        var cpus = 1
        /// Rounds before the guest is told to move; `nil`: it is told at once.
        var rounds: UInt64?
        var preempts = false
        var urgentChannels: UInt64 = 1
        var channels: UInt64 = 0
        var isUnix = false
        var isPaced = false
        /// Of the destination's RAM.
        var backing = RAMBacking.anonymous.rawValue

        var testDescription: String {
            let when = rounds.map { "after \($0) rounds" } ?? "at once"
            return
                "\(cpus) vCPUs, \(when)\(preempts ? ", \(urgentChannels) urgent" : "")\(channels > 0 ? ", \(channels) channels" : "")"
                + (isUnix ? ", unix" : "") + (isPaced ? ", paced" : "")
        }

        var capabilities: [(capability: MigrationCapability, on: Bool)] {
            [(.postcopyRAM, true), (.postcopyPreempt, preempts), (.multifd, channels > 0)]
        }
    }

    /// A machine like this one that takes postcopy.
    func pairDestination(_ terms: PairTerms = PairTerms(), cpus: Int? = nil) throws -> Migrator {
        let destination = try destination(cpus: cpus, backing: RAMBacking(rawValue: terms.backing) ?? .anonymous)
        try destination.set(terms.capabilities)
        return destination
    }

    func set(_ terms: PairTerms) throws {
        try set(terms.capabilities)
        var parameters = MigrationParameters()
        // The guest is to be told before precopy comes to its end by itself.
        parameters.maxBandwidthBytesPerSecond = 64 << 20
        parameters.downtimeLimitMilliseconds = 0
        parameters.postcopyChannels = terms.urgentChannels
        if terms.channels > 0 { parameters.multifdChannels = terms.channels }
        if terms.isPaced { parameters.maxPostcopyBandwidthBytesPerSecond = 1 << 20 }
        try set(parameters)
    }

    func awaitStatus(_ status: MigrationStatus, _ when: String) throws {
        try waitFor("\(status) \(when), it is \(info().status): \(info().errorDescription ?? "no error")") {
            info().status == status
        }
    }

    /// Migrates, and tells the guest to move.
    func move(to address: MigrationAddress, after rounds: UInt64? = nil) throws {
        try migrate(to: address)
        if let rounds {
            try waitFor("\(rounds) rounds") { (info().ram?.dirtySyncCount ?? 0) > rounds || isOver }
        } else {
            try waitFor("the migration to begin") { info().status != .setup }
        }
        try startPostcopy()
    }
}
