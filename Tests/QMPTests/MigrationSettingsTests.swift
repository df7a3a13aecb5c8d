import Migration
import Testing

@testable import QMP

@Suite struct MigrationSettingsTests {
    private func state(_ vm: MonitoredMachine, _ name: String) throws -> Bool? {
        try vm.run("query-migrate-capabilities").arrayValue?.first { $0["capability"]?.stringValue == name }?["state"]?
            .boolValue
    }

    @Test("every capability is listed once, those of the Migration room among them")
    func listed() throws {
        let vm = try MonitoredMachine()
        let names =
            try vm.run("query-migrate-capabilities").arrayValue?.compactMap { $0["capability"]?.stringValue } ?? []
        #expect(Set(names).count == names.count)
        #expect(Set(MigrationCapability.allCases.map(\.rawValue)).isSubset(of: names))
        #expect(Set(MigrationCapability.unsupported).isSubset(of: names))
    }

    @Test("a capability we lack is refused by name, and nothing of the same command takes effect")
    func unsupported() throws {
        let vm = try MonitoredMachine()
        func set(_ list: [(String, Bool)]) -> [String: JSON] {
            ["capabilities": .array(list.map { ["capability": .string($0.0), "state": .bool($0.1)] })]
        }
        let names = MigrationSettings.capabilityNames.filter { MigrationCapability(rawValue: $0) == nil }
        for name in names {
            #expect(
                try vm.refusal("migrate-set-capabilities", set([("pause-before-switchover", true), (name, true)]))
                    .contains("'\(name)'"))
            try vm.run("migrate-set-capabilities", set([(name, false)]))
            #expect(try state(vm, name) == false)
        }
        #expect(try state(vm, "pause-before-switchover") == false)
        try vm.run("migrate-set-capabilities", set([("pause-before-switchover", true), ("events", false)]))
        #expect(try state(vm, "pause-before-switchover") == true)
        #expect(try state(vm, "events") == false)
    }

    @Test("our parameters are set and told, one alone leaves the others")
    func parameters() throws {
        let vm = try MonitoredMachine()
        // What the benchmark sets.
        try vm.run("migrate-set-parameters", ["downtime-limit": 300, "max-bandwidth": JSON(1 << 40)])
        try vm.run("migrate-set-parameters", ["avail-switchover-bandwidth": 5])
        try vm.run("migrate-set-parameters", ["downtime-limit": 20])
        let now = try vm.run("query-migrate-parameters")
        #expect(now["downtime-limit"] == 20)
        #expect(now["max-bandwidth"] == JSON(1 << 40))
        #expect(now["avail-switchover-bandwidth"] == 5)
        try vm.run("migrate-set-parameters", ["max-bandwidth": JSON(UInt64.max), "downtime-limit": 2_000_000])
        #expect(try vm.run("query-migrate-parameters")["max-bandwidth"] == JSON(UInt64.max))
        #expect(try vm.refusal("migrate-set-parameters", ["downtime-limit": 2_000_001]).contains("2000001"))
        #expect(try vm.run("query-migrate-parameters")["downtime-limit"] == 2_000_000)
    }

    @Test("the cache of xbzrle has a size in QEMU's bounds, and the capability is one of ours")
    func xbzrle() throws {
        let vm = try MonitoredMachine()
        #expect(try vm.run("query-migrate-parameters")["xbzrle-cache-size"] == JSON(64 << 20))
        try vm.run("migrate-set-parameters", ["xbzrle-cache-size": 8192])
        for size in [0, 1, 5000, 12288] as [UInt64] {
            #expect(
                try vm.refusal("migrate-set-parameters", ["xbzrle-cache-size": JSON(size)])
                    == "Parameter 'xbzrle-cache-size' expects a power of two no less than the target page size")
        }
        #expect(try vm.run("query-migrate-parameters")["xbzrle-cache-size"] == 8192)
        try vm.run(
            "migrate-set-capabilities", ["capabilities": [["capability": "xbzrle", "state": true]]])
        #expect(try state(vm, "xbzrle") == true)
    }

    @Test(
        "compression of channels is chosen by QEMU's names; a method we lack is refused by name, a level out of range too"
    )
    func compression() throws {
        let vm = try MonitoredMachine()
        #expect(try vm.run("query-migrate-parameters")["multifd-compression"] == "none")
        for name in ["zlib", "zstd", "none", "zstd"] {
            try vm.run("migrate-set-parameters", ["multifd-compression": .string(name)])
            #expect(try vm.run("query-migrate-parameters")["multifd-compression"] == .string(name))
        }
        for name in ["qatzip", "qpl", "uadk"] {
            let refusal = try vm.refusal("migrate-set-parameters", ["multifd-compression": .string(name)])
            #expect(refusal.contains("'\(name)'") && refusal.contains("zstd"), "\(refusal)")
        }
        try vm.run("migrate-set-parameters", ["multifd-zlib-level": 9, "multifd-zstd-level": 20])
        #expect(
            try vm.refusal("migrate-set-parameters", ["multifd-zlib-level": 10])
                == "Parameter 'multifd-zlib-level' expects a value between 0 and 9")
        #expect(try vm.refusal("migrate-set-parameters", ["multifd-zstd-level": 21]).contains("between 0 and 20"))
        let now = try vm.run("query-migrate-parameters")
        #expect(now["multifd-compression"] == "zstd" && now["multifd-zlib-level"] == 9)
    }

    @Test("every other parameter takes the value it has and refuses another, naming itself")
    func others() throws {
        let vm = try MonitoredMachine()
        let before = try vm.run("query-migrate-parameters")
        for entry in MigrationParameterEntry.all {
            let off: JSON
            switch entry.meaning {
            case .setting, .flag, .text, .choice: continue
            case .off(let value, _):
                off = value
                #expect(before[entry.name] == value)
            case .absent(let value, _):
                off = value
                #expect(before[entry.name] == nil)
            }
            try vm.run("migrate-set-parameters", [entry.name: off])
            #expect(try vm.refusal("migrate-set-parameters", [entry.name: other(than: off)]).contains(entry.name))
        }
        #expect(try vm.run("query-migrate-parameters") == before)
        try vm.run("migrate-set-parameters", ["tls-creds": nil])
        #expect(try vm.refusal("migrate-set-parameters", ["nope": 1]) == "Parameter 'nope' is unexpected")
    }

    @Test("throttling is set by QEMU's parameters, and what makes no sense is refused by name")
    func throttling() throws {
        let vm = try MonitoredMachine()
        let before = try vm.run("query-migrate-parameters")
        let defaults: [(String, JSON)] = [
            ("throttle-trigger-threshold", 50), ("cpu-throttle-initial", 20), ("cpu-throttle-increment", 10),
            ("max-cpu-throttle", 99), ("cpu-throttle-tailslow", false), ("vcpu-dirty-limit", 1),
            ("x-vcpu-dirty-limit-period", 1000),
        ]
        for (name, value) in defaults { #expect(before[name] == value) }
        try vm.run(
            "migrate-set-parameters",
            ["cpu-throttle-initial": 30, "max-cpu-throttle": 80, "cpu-throttle-tailslow": true, "vcpu-dirty-limit": 64])
        let now = try vm.run("query-migrate-parameters")
        #expect(now["cpu-throttle-initial"] == 30 && now["max-cpu-throttle"] == 80)
        #expect(now["cpu-throttle-tailslow"] == true && now["vcpu-dirty-limit"] == 64)
        for (name, value) in [
            ("throttle-trigger-threshold", 0), ("throttle-trigger-threshold", 101), ("cpu-throttle-initial", 0),
            ("cpu-throttle-increment", 100), ("max-cpu-throttle", 29), ("max-cpu-throttle", 100),
            ("vcpu-dirty-limit", 0), ("x-vcpu-dirty-limit-period", 1001),
        ] {
            #expect(try vm.refusal("migrate-set-parameters", [name: JSON(value)]).contains("\(name) \(value)"))
        }
        #expect(try vm.run("query-migrate-parameters") == now)
    }

    @Test("auto-converge is turned on anywhere, dirty-limit on machines with a ring only")
    func throttlingCapabilities() throws {
        let vm = try MonitoredMachine()
        func set(_ name: String, _ on: Bool) -> [String: JSON] {
            ["capabilities": [["capability": .string(name), "state": .bool(on)]]]
        }
        let reason = try vm.refusal("migrate-set-capabilities", set("dirty-limit", true))
        #expect(reason.contains("no dirty ring") && reason.contains("--accel kvm,dirty-ring-size="), "\(reason)")
        try vm.run("migrate-set-capabilities", set("auto-converge", true))
        #expect(try state(vm, "auto-converge") == true)
        #expect(try vm.refusal("migrate-set-capabilities", set("dirty-limit", true)).contains("auto-converge"))
        try vm.run("migrate-set-capabilities", set("auto-converge", false))
        #expect(try state(vm, "auto-converge") == false)
    }

    @Test("a dry run says what it needs to know, and which guest it cannot watch")
    func dryRun() throws {
        let vm = try MonitoredMachine()
        #expect(try vm.refusal("x-migrate-dry-run").contains("no running guest"))
        #expect(try vm.refusal("x-migrate-dry-run", ["uri": "nowhere"]).contains("nowhere"))
    }

    @Test("a verdict is told with its figures, times in milliseconds")
    func verdict() {
        var info = MigrationInfo()
        (info.status, info.direction) = (.active, .outgoing)
        var verdict = ConvergenceVerdict(.notConverging)
        verdict.uniqueBytesPerSecond = 600_000_000
        verdict.linkBytesPerSecond = 500_000_000
        verdict.remedies = [.downtimeLimit(milliseconds: 900), .bandwidth(bytesPerSecond: 700_000_000)]
        info.verdict = verdict
        info.throttlePercentage = 30
        let json = info.json(downtimeLimitMilliseconds: 300)
        #expect(json["cpu-throttle-percentage"] == 30)
        #expect(json["x-verdict"]?["state"] == "not-converging")
        #expect(json["x-verdict"]?["converging"] == false)
        #expect(json["x-verdict"]?["unique-dirty-rate"] == 600_000_000)
        #expect(json["x-verdict"]?["remedies"]?[0]?["name"] == "downtime-limit")
        #expect(json["x-verdict"]?["remedies"]?[1]?["value"] == 700_000_000)
        #expect(json["x-verdict"]?["sentence"]?.stringValue == verdict.sentence)
        verdict = ConvergenceVerdict(.converging)
        verdict.remainingNanoseconds = 1_500_000_000
        info.verdict = verdict
        #expect(info.json(downtimeLimitMilliseconds: 300)["x-verdict"]?["expected-end-ms"] == 1500)
    }

    /// A value of the same type.
    private func other(than value: JSON) -> JSON {
        switch value {
        case .bool(let value): .bool(!value)
        case .integer(let value): .integer(value + 1)
        case .string("none"): "zlib"
        case .string("legacy"): "multifd"
        case .string("normal"): "cpr-exec"
        case .array: ["x"]
        default: "other"
        }
    }
}
