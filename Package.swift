// swift-tools-version: 6.3
import PackageDescription

/// Every target of ours: Swift 6 mode, unsafe code marked, and no warning tolerated.
let house: [SwiftSetting] = [
    .swiftLanguageMode(.v6),
    .strictMemorySafety(),
    .treatAllWarnings(as: .error),
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("MemberImportVisibility"),
    .enableUpcomingFeature("InternalImportsByDefault"),
    .enableExperimentalFeature("Lifetimes"),
]

/// A room of the house (see ARCHITECTURE.md); `standsOn` lists the rooms below it that it may import.
func room(_ name: String, standsOn: [Target.Dependency] = [], resources: [Resource]? = nil) -> Target {
    .target(name: name, dependencies: standsOn, resources: resources, swiftSettings: house)
}

func tests(_ name: String, of rooms: [Target.Dependency], besides files: [String] = []) -> Target {
    .testTarget(name: name, dependencies: rooms, exclude: files, swiftSettings: house)
}

let argumentParser: Target.Dependency = .product(name: "ArgumentParser", package: "swift-argument-parser")
let logging: Target.Dependency = .product(name: "Logging", package: "swift-log")

let package = Package(
    name: "godwit",
    products: [.executable(name: "godwit", targets: ["godwit"])],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2"),
        .package(url: "https://github.com/apple/swift-log", from: "1.16.2"),
    ],
    targets: [
        // What everything stands on.
        .target(name: "CLinux"),
        room("Host", standsOn: ["CLinux"]),
        room("GuestMemory", standsOn: ["Host"]),
        // How it runs, how it travels.
        room("MigrationStream"),
        room("Transport", standsOn: ["Host", "GuestMemory"]),
        room("Compression", standsOn: ["Host"]),
        room("Accelerator", standsOn: ["GuestMemory"]),
        room("KVM", standsOn: ["CLinux", "Host", "GuestMemory", "Accelerator"]),
        // The VM.
        room("GuestPrograms"),
        room("Devices", standsOn: ["Host"]),
        room("Machine", standsOn: ["Host", "GuestMemory", "Accelerator", "KVM", "Devices", "GuestPrograms"]),
        room(
            "Migration",
            standsOn: [
                "Host", "GuestMemory", "MigrationStream", "Transport", "Compression", "Accelerator", "Machine",
            ]),
        // Control.
        room(
            "QMP",
            standsOn: ["Host", "GuestMemory", "Accelerator", "GuestPrograms", "Machine", "Migration", "Transport"]),
        room("CommandLineKit", standsOn: ["CLinux", "Host", "QMP"]),
        room(
            "Benchmarks",
            standsOn: [
                "Host", "GuestMemory", "Transport", "Accelerator", "KVM", "GuestPrograms", "Machine", "Migration",
                "QMP", "CommandLineKit",
            ]),
        .executableTarget(
            name: "godwit",
            dependencies: [
                "Accelerator", "Host", "GuestMemory", "GuestPrograms", "MigrationStream", "Machine", "Migration",
                "QMP", "Transport", "CommandLineKit", "Benchmarks", argumentParser, logging,
            ],
            swiftSettings: house),

        tests("HouseTests", of: ["Host"]),
        tests("HostTests", of: ["Host", "TestSupport"]),
        tests("GuestMemoryTests", of: ["GuestMemory", "Host", "TestSupport"]),
        tests("MigrationStreamTests", of: ["MigrationStream", "TestSupport"]),
        tests("TransportTests", of: ["Transport", "Host", "GuestMemory", "TestSupport"]),
        tests("CompressionTests", of: ["Compression", "Host", "TestSupport"]),
        tests("KVMTests", of: ["KVM", "Accelerator", "GuestMemory", "Host", "TestSupport"]),
        tests("GuestProgramsTests", of: ["GuestPrograms", "TestSupport"]),
        tests("DevicesTests", of: ["Devices", "Host", "TestSupport"]),
        tests("MachineTests", of: ["Machine", "Devices", "GuestMemory", "Host", "GuestPrograms", "TestSupport"]),
        tests(
            "MigrationTests",
            of: ["Migration", "MigrationStream", "Compression", "GuestMemory", "Host", "TestSupport"]),
        tests("Simulation", of: ["Migration", "MigrationStream", "TestSupport"]),
        tests("QMPTests", of: ["QMP", "Host"]),
        tests("BenchmarksTests", of: ["Benchmarks", "QMP", "CommandLineKit", "GuestPrograms", "Host", "Machine"]),
        // Tests that start real processes.
        .target(name: "TestSupport", dependencies: ["Host", "QMP"], path: "Tests/Support", swiftSettings: house),
        tests("CommandLineTests", of: ["CommandLineKit", "QMP", "Host", "MigrationStream", "TestSupport"]),
        tests(
            "Conformance",
            of: [
                "QMP", "Host", "GuestMemory", "MigrationStream", "Transport", "Accelerator", "Migration", "TestSupport",
            ], besides: ["drive_migration.py"]),
        tests("FaultInjection", of: ["QMP", "Host", "MigrationStream", "TestSupport"]),
    ]
)
