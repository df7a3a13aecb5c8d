import ArgumentParser
import CommandLineKit
import Glibc
import GuestMemory
import Host
import Logging
import Machine
import QMP
import Transport

struct Run: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Start a VM in the foreground.",
        discussion: """
            The VM runs until its guest shuts down, `godwit quit NAME` ends it, or a signal does (SIGINT, SIGTERM, SIGHUP). \
            The exit status is 0 then, or what the guest wrote to the debug-exit port.
            """)

    @Option(
        help: ArgumentHelp(
            "What the VM is called, and its QMP socket named after. (default: vm-PID)", valueName: "name"),
        transform: { try VMName($0) })
    var name: VMName?

    @Option(
        help: ArgumentHelp("RAM: a multiple of 4K such as 512M or 4G. (default: 256M)", valueName: "size"),
        transform: { try ByteSize($0) })
    var memory = ByteSize(bytes: 256 << 20)

    @Option(help: ArgumentHelp("Virtual CPUs, 1 to 64.", valueName: "n"))
    var cpus = 1

    @Option(
        help: ArgumentHelp(
            """
            What runs the guest: kvm[,dirty-tracking=auto|log|ring][,dirty-ring-size=N]. How written pages are found: by KVM's dirty \
            log, or by a dirty ring of N entries for each vCPU, as many as the kernel allows if N is left out.
            """, valueName: "spec"), transform: { try AcceleratorOption($0) })
    var accel = AcceleratorOption()

    @Option(help: "pc, or none: RAM without vCPUs and devices, as QEMU's -M none.")
    var machine = MachineOption.pc

    @Option(
        help: ArgumentHelp(
            """
            What stands behind RAM: private memory with huge pages (anonymous), a memfd, which another process can be given, or the \
            host's reserved huge pages (hugetlb=2M, hugetlb=1G).
            """, valueName: "kind"))
    var memoryBacking: MemoryBackingOption = .anonymous

    @Flag(help: "Take all RAM from the host before the guest starts or arrives, and not at its first touch.")
    var memoryPrealloc = false

    @Option(
        help: ArgumentHelp(
            "A UUID for the VM, 8-4-4-4-12 hexadecimal digits, which a migration can compare (validate-uuid).",
            valueName: "uuid"), transform: Self.uuid(_:))
    var uuid: MachineUUID?

    @OptionGroup(title: "What to boot") var boot: BootOptions

    @Option(
        help: ArgumentHelp("The serial line: stdio, none, file:PATH or unix:PATH.", valueName: "target"),
        transform: SerialPort.Target.init(option:))
    var serial = SerialPort.Target.standard

    @Option(
        help: ArgumentHelp(
            "Wait for a migration on this address, or for a migrate-incoming command (defer).", valueName: "uri"),
        transform: VMProcess.Incoming.init(option:))
    var incoming: VMProcess.Incoming?

    @Option(
        help: ArgumentHelp(
            "Go on from what 'godwit save' (or a migration to file:) left in this file, PATH[,offset=N].",
            valueName: "file"), transform: { try MigrationAddress("file:\($0)") })
    var restore: MigrationAddress?

    @Flag(
        help: """
            With --restore, of a file that 'godwit save' wrote: read memory when the guest touches it. The file must stay as it is \
            as long as the VM runs; it is not changed.
            """)
    var restoreLazily = false

    @OptionGroup(title: "TLS") var security: SecurityOptions

    @Option(
        help: ArgumentHelp(
            "A QMP socket, unix:PATH, instead of the one that goes by the name; may be repeated.",
            valueName: "address"),
        transform: Self.socketPath(_:))
    var qmp: [String] = []

    @Flag(help: "Do not start the guest, or the one that arrives.")
    var paused = false

    @Flag(help: ArgumentHelp("End when the process that started this one ends.", visibility: .hidden))
    var dieWithParent = false

    func validate() throws {
        if restore != nil, incoming != nil { throw ValidationError("--restore and --incoming exclude each other.") }
        guard restoreLazily else { return }
        guard restore != nil else { throw ValidationError("--restore-lazily goes with --restore.") }
        guard memoryBacking == .anonymous, !memoryPrealloc else {
            throw ValidationError("--restore-lazily needs private memory that is not taken beforehand.")
        }
    }

    func run() throws {
        let incoming = restore.map { VMProcess.Incoming.address($0) } ?? incoming
        if dieWithParent { try ChildProcess.dieWithParent() }
        // A VM that is just being made is waited for, so that its sockets go with it.
        let vm = Monitor<VMProcess?>(nil)
        try SignalWatch.start { signal in
            guard let process = vm.wait(deadline: .after(seconds: 10), until: { $0 }) else { Glibc._exit(128 + signal) }
            process.end(.signal(signal))
        }
        let name = try self.name ?? VMName("vm-\(getpid())")
        let log = Logger(label: "godwit", factory: { _ in StandardErrorLog(name: name.text) })
        var configuration = MachineConfiguration(
            kind: machine.kind, memoryByteCount: memory.bytes, cpuCount: cpus,
            boot: try boot.source(memoryByteCount: memory.bytes), backing: memoryBacking.backing,
            isPreallocated: memoryPrealloc, dirtyTracking: accel.dirtyTracking, isIncoming: incoming != nil)
        configuration.uuid = uuid
        let plan = VMProcess.Plan(
            name: name, socketPaths: qmp, isNamed: qmp.isEmpty, serial: serial, incoming: incoming,
            restoresLazily: restoreLazily, startsPaused: paused, objects: security.object,
            parameters: security.parameters,
            allowsPlaintext: security.insecurePlaintext)
        let process = try VMProcess(plan, machine: configuration, log: log)
        vm.withLock { $0 = process }
        Self.exit(withError: ExitCode(try process.run()))
    }

    private static func uuid(_ text: String) throws -> MachineUUID {
        guard let uuid = MachineUUID(text) else {
            throw ValidationError(
                "UUID '\(text)': give 8-4-4-4-12 hexadecimal digits, such as 6b8f0d3e-1c52-4a7e-9f30-2d4c5b6a7988")
        }
        return uuid
    }

    private static func socketPath(_ text: String) throws -> String {
        guard text.hasPrefix("unix:"), text.count > 5 else {
            throw ValidationError("QMP address '\(text)': only unix:PATH is possible")
        }
        return String(text.dropFirst(5))
    }
}

// MARK: Options

/// `--machine`.
enum MachineOption: String, ExpressibleByArgument, CaseIterable {
    case pc, none

    var kind: MachineConfiguration.Kind { self == .pc ? .pc : .none }
}

/// `--memory-backing`.
enum MemoryBackingOption: String, ExpressibleByArgument, CaseIterable {
    case anonymous, memfd
    case hugetlb2M = "hugetlb=2M"
    case hugetlb1G = "hugetlb=1G"

    var backing: RAMBacking { RAMBacking(rawValue: rawValue) ?? .anonymous }
}

extension SerialPort.Target {
    init(option text: String) throws {
        switch text {
        case "none": self = .none
        case "stdio": self = .standard
        case _ where text.hasPrefix("file:") && text.count > 5: self = .file(String(text.dropFirst(5)))
        case _ where text.hasPrefix("unix:") && text.count > 5: self = .unix(String(text.dropFirst(5)))
        default: throw ValidationError("serial target '\(text)': possible are stdio, none, file:PATH and unix:PATH")
        }
    }
}

extension VMProcess.Incoming {
    init(option text: String) throws {
        self = text == "defer" ? .deferred : .address(try MigrationAddress(text))
    }
}
