import ArgumentParser
import CommandLineKit
import QMP

struct Info: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Show what is known about a VM.")

    enum Topic: String, ExpressibleByArgument, CaseIterable {
        case migrate, status, memory, vcpus
        case dirtyRate = "dirty-rate"

        /// What tells it; measured first, where it is `query-dirty-rate`.
        var command: String {
            switch self {
            case .migrate: "query-migrate"
            case .status: "query-status"
            case .memory: "query-memory-size-summary"
            case .vcpus: "query-cpus-fast"
            case .dirtyRate: "query-dirty-rate"
            }
        }
    }

    @OptionGroup var target: VMArgument

    @Argument(help: "What to show; everything in short without it.")
    var topic: Topic?

    @Flag(help: "Print what the VM answers as JSON.")
    var json = false

    func run() throws {
        guard let topic else { return try showOverview() }
        let answer = topic == .dirtyRate ? try measuredDirtyRate() : try target.execute(topic.command)
        Terminal.output.write(json ? answer.prettyDescription + "\n" : Self.text(topic, answer))
    }

    private func showOverview() throws {
        let client = try target.vm.connect()
        let overview = try VMOverview(of: target.vm, client: client)
        Terminal.output.write(json ? overview.json.prettyDescription + "\n" : VMOverview.table([overview]))
    }

    private func measuredDirtyRate() throws -> JSON {
        let client = try target.vm.connect()
        defer { client.close() }
        do { return try DirtyRateReading(measuredBy: client).json } catch QMPClientError.refused(let error) {
            throw CommandFailure("VM \(target.vm): \(error)")
        }
    }

    private static func text(_ topic: Topic, _ answer: JSON) -> String {
        switch topic {
        case .migrate:
            return MigrationReport(MigrationReading(answer), showsColors: Terminal.output.showsColors).text
        case .status: return "VM status: \(answer["status"]?.stringValue ?? "unknown")\n"
        case .memory:
            let bytes = answer["base-memory"]?.integerValue(as: UInt64.self) ?? 0
            return "memory: \(Amount.memory(bytes)) (\(bytes) bytes)\n"
        case .vcpus:
            var table = TextTable([("VCPU", .right), ("THREAD", .right)])
            for cpu in answer.arrayValue ?? [] {
                table.add([
                    cpu["cpu-index"]?.integerValue().map { String($0) } ?? "?",
                    cpu["thread-id"]?.integerValue().map { String($0) } ?? "?",
                ])
            }
            return table.text
        case .dirtyRate: return DirtyRateReading(answer).text
        }
    }
}
